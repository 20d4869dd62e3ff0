r"""How the gradient of one parameter is made small: each of its two sides is reduced on its own.

A parameter is seen as a matrix, its first axis by all others. With A and B the two reductions,
`[size, rank]`, the small form of a gradient G is :math:`A^\top G B`. Where G is a sum of outer
products :math:`\sum b a^\top`, as a linear layer's is, that equals :math:`\sum (A^\top b)(B^\top
a)^\top`, and G need not exist.
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
        """How many entries are left."""

    @abc.abstractmethod
    def reduce(self, x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest rank"]:
        """Apply the map along the last axis."""

    @abc.abstractmethod
    def unit(self, index: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest rank"]:
        """What unit vectors become, given the place of their one."""

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
        """Entries before."""
        return len(self.basis)

    @property
    def rank(self) -> int:
        """Entries after."""
        return self.basis.shape[1]

    def reduce(self, x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest rank"]:
        """Apply the map along the last axis."""
        return x.to(self.basis.dtype) @ self.basis

    def unit(self, index: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest rank"]:
        """Rows of the matrix."""
        return self.basis[index]

    def scaled(self, factors: Float[Tensor, " size"]) -> "Dense":
        """Rows times their factors."""
        return Dense(self.basis * factors[:, None])


@final
@dataclass(frozen=True, slots=True)
class Picked(Side):
    """A choice of entries, each with a weight.

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
        """Entries after."""
        return len(self.index)

    def reduce(self, x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest rank"]:
        """Apply the map along the last axis."""
        return x[..., self.index] * self.weight

    def unit(self, index: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest rank"]:
        """Zero but where the one was picked."""
        return (index[..., None] == self.index) * self.weight

    def scaled(self, factors: Float[Tensor, " size"]) -> "Picked":
        """Weights times the factors of what was picked."""
        return Picked(self.size, self.index, self.weight * factors[self.index])


def reduced(sides: Sequence[Side], x: Tensor) -> list[Tensor]:
    """What each of several maps makes of the same entries; x is read once where they are matrices.

    >>> [
    ...     found.tolist()
    ...     for found in reduced(
    ...         [Dense(torch.ones(2, 1)), Dense(2 * torch.ones(2, 1))], torch.ones(1, 2)
    ...     )
    ... ]
    [[[2.0]], [[4.0]]]
    """
    bases = [side.basis for side in sides if isinstance(side, Dense)]
    if len(bases) < 2 or len(bases) < len(sides):
        return [side.reduce(x) for side in sides]
    return list(
        torch.split(x.to(bases[0].dtype) @ torch.cat(bases, 1), [side.rank for side in sides], -1)
    )


@final
@dataclass(frozen=True, slots=True)
class KroneckerSketch:
    """The reductions of a parameter: of its first axis, and of all others taken as one (None: there are none)."""

    left: Side
    right: Side | None = None

    @property
    def rank(self) -> int:
        """Entries of the small form."""
        return self.left.rank * (1 if self.right is None else self.right.rank)

    def reduce(self, gradient: Float[Tensor, "row ..."]) -> Float[Tensor, "row rank"]:
        """The small form of whole gradients."""
        if self.right is None:
            return self.left.reduce(gradient.reshape(len(gradient), self.left.size))
        matrix = self.right.reduce(gradient.reshape(len(gradient), self.left.size, self.right.size))
        return self.left.reduce(matrix.mT).mT.flatten(1)

    def scaled(
        self, left: Float[Tensor, " left"], right: Float[Tensor, " right"] | None = None
    ) -> "KroneckerSketch":
        r"""The reductions after :math:`G \to d_\text{left} d_\text{right}^\top \odot G`; without a right one, ones."""
        columns = self.right if self.right is None or right is None else self.right.scaled(right)
        return KroneckerSketch(self.left.scaled(left), columns)

    @staticmethod
    def sizes(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of a parameter's one or two sides.

        >>> (
        ...     KroneckerSketch.sizes((8, 3, 5, 5)),
        ...     KroneckerSketch.sizes((7,)),
        ...     KroneckerSketch.sizes(()),
        ... )
        ((8, 75), (7,), (1,))
        """
        return (prod(shape),) if len(shape) < 2 else (shape[0], prod(shape[1:]))
