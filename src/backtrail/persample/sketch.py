r"""Kronecker-factored sketches: each of the two sides of a gradient is reduced on its own.

A parameter is taken as a matrix, its first axis by all others. With A and B the two reductions,
`[size, rank]`, the sketch of a gradient G is :math:`A^\top G B`. Where G is a sum of outer products
:math:`\sum b a^\top`, as a linear layer's is, that equals :math:`\sum (A^\top b)(B^\top a)^\top`,
and G is never formed.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Side(abc.ABC):
    """A linear map from an axis of `size` entries to one of `rank`."""

    size: int

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """Number of entries after the map."""

    @abc.abstractmethod
    def reduce(self, x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest rank"]:
        """Apply the map along the last axis."""

    @abc.abstractmethod
    def unit(self, index: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest rank"]:
        """Map unit vectors, given the index of their one."""

    @abc.abstractmethod
    def scaled(self, factors: Float[Tensor, " size"]) -> "Side":
        """The map after a multiplication of every entry by its factor."""


@final
@dataclass(frozen=True, slots=True)
class Dense(Side):
    """Multiplication with a matrix `[size, rank]`.

    >>> Dense(torch.ones(3, 1)).reduce(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[6.0]]
    """

    basis: Float[Tensor, "size rank"]

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of entries before the map."""
        return len(self.basis)

    @property
    def rank(self) -> int:
        """Number of entries after the map."""
        return self.basis.shape[1]

    def reduce(self, x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest rank"]:
        """Apply the map along the last axis."""
        return x.to(self.basis.dtype) @ self.basis

    def unit(self, index: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest rank"]:
        """Rows of the matrix."""
        return self.basis[index]

    def scaled(self, factors: Float[Tensor, " size"]) -> "Dense":
        """Multiply each row by its factor."""
        return Dense(self.basis * factors[:, None])


@final
@dataclass(frozen=True, slots=True)
class Picked(Side):
    """A selection of entries, each with a weight.

    >>> Picked(3, torch.tensor([2]), torch.tensor([10.0])).reduce(
    ...     torch.tensor([1.0, 2.0, 3.0])
    ... ).tolist()
    [30.0]
    """

    size: int
    index: Int[Tensor, " rank"]
    weight: Float[Tensor, " rank"]

    @property
    def rank(self) -> int:
        """Number of entries after the map."""
        return len(self.index)

    def reduce(self, x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest rank"]:
        """Apply the map along the last axis."""
        return x[..., self.index] * self.weight

    def unit(self, index: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest rank"]:
        """The weight where the one was picked, zero elsewhere."""
        return (index[..., None] == self.index) * self.weight

    def scaled(self, factors: Float[Tensor, " size"]) -> "Picked":
        """Multiply each weight by the factor of its entry."""
        return Picked(self.size, self.index, self.weight * factors[self.index])


def reduce_all(sides: Sequence[Side], x: Tensor) -> list[Tensor]:
    """Apply several maps to the same entries; x is read only once if all of them are matrices.

    >>> sides = [Dense(torch.ones(2, 1)), Dense(2 * torch.ones(2, 1))]
    >>> [found.tolist() for found in reduce_all(sides, torch.ones(1, 2))]
    [[[2.0]], [[4.0]]]
    """
    bases = [side.basis for side in sides if isinstance(side, Dense)]
    if len(bases) < 2 or len(bases) < len(sides):
        return [side.reduce(x) for side in sides]
    products = x.to(bases[0].dtype) @ torch.cat(bases, 1)
    return list(torch.split(products, [side.rank for side in sides], -1))


@final
@dataclass(frozen=True, slots=True)
class KroneckerSketch:
    r"""The sketch :math:`A^\top G B` of a parameter's gradient G.

    Attributes:
        left: A, which reduces the parameter's first axis.
        right: B, which reduces all other axes taken as one; None for a vector, which has none.
    """

    left: Side
    right: Side | None = None

    @property
    def rank(self) -> int:
        """Number of entries of the sketch."""
        return self.left.rank * (1 if self.right is None else self.right.rank)

    def reduce(self, gradient: Float[Tensor, "row ..."]) -> Float[Tensor, "row rank"]:
        """Sketch whole gradients, one per row."""
        if self.right is None:
            return self.left.reduce(gradient.reshape(len(gradient), self.left.size))
        matrices = gradient.reshape(len(gradient), self.left.size, self.right.size)  # G
        reduced = self.right.reduce(matrices)  # G B
        return self.left.reduce(reduced.mT).mT.flatten(1)  # A' G B

    def scaled(
        self, left: Float[Tensor, " left"], right: Float[Tensor, " right"] | None = None
    ) -> "KroneckerSketch":
        r"""The sketch of :math:`d_\text{left} d_\text{right}^\top \odot G`; None means ones."""
        scaled_right = self.right
        if self.right is not None and right is not None:
            scaled_right = self.right.scaled(right)
        return KroneckerSketch(self.left.scaled(left), scaled_right)

    @staticmethod
    def sizes(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of a parameter's one or two sides.

        >>> KroneckerSketch.sizes((8, 3, 5, 5)), KroneckerSketch.sizes((7,))
        ((8, 75), (7,))
        >>> KroneckerSketch.sizes(())
        (1,)
        """
        if len(shape) < 2:
            return (prod(shape),)
        return (shape[0], prod(shape[1:]))
