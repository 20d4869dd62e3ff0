r"""Curvature between many pairs of gradients, through a few directions that they mostly lie in.

With an orthonormal basis Q of such directions and :math:`W = H Q`, the part of a pair inside the
span is exact, and so is the part between inside and outside. Only the curvature between the two
parts outside is left out:

.. math:: a^\top H b \approx (Q a)^\top W b + (W a)^\top Q b - (Q a)^\top (Q W^\top) (Q b)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.methods.diff_in.row_gradients import inner_products
from backtrail.tree import Tree, add, concatenate, flat_rows


@final
@dataclass(frozen=True, slots=True)
class Subspace:
    """Some directions, and the curvature products with them.

    Attributes:
        directions: Q, followed by W, `[direction, ...]`.
        inner: The matrix (-Q W^T, 1; 1, 0) that pairs two vectors' coordinates along them.
    """

    directions: Tree
    inner: Tensor

    @staticmethod
    def spanned(directions: Tree, curvature_product: Callable[[Tree], Tree]) -> "Subspace":
        """The subspace that a stack of directions spans."""
        basis = orthonormal(directions)
        curved = curvature_product(basis)
        within = inner_products(basis, curved)
        one = torch.eye(len(within)).to(within)
        zero = torch.zeros_like(one)
        top = torch.cat([-within, one], dim=1)
        bottom = torch.cat([one, zero], dim=1)
        return Subspace(concatenate([basis, curved]), torch.cat([top, bottom]))

    def bilinear(self, left: Tree, right: Tree) -> Float[Tensor, " row"]:
        """Products of two stacks through the curvature, row by row."""
        left_coordinates = inner_products(self.directions, left)
        if right is left:
            right_coordinates = left_coordinates
        else:
            right_coordinates = inner_products(self.directions, right)
        return (left_coordinates * (self.inner @ right_coordinates)).sum(0)


def orthonormal(directions: Tree) -> Tree:
    """An orthonormal basis of the span of a stack, `[direction, ...]`."""
    flat = torch.cat([flat_rows(tensor) for tensor in directions.values()], dim=1)
    basis = torch.linalg.qr(flat.T)[0].T
    sizes = [tensor[0].numel() for tensor in directions.values()]
    parts = torch.split(basis, sizes, dim=1)
    return {
        name: part.reshape(-1, *directions[name].shape[1:])
        for name, part in zip(directions, parts, strict=True)
    }


def random_combinations(stacks: Iterable[Tree], rank: int) -> Tree:
    """Random combinations of the rows of some stacks, `[rank, ...]`: they span most of the rows.

    Rows are scaled to length 1 first, so that the long gradient of a wrong label does not hide
    the others.
    """
    generator = torch.Generator().manual_seed(0)
    total: Tree = {}
    for rows in stacks:
        like = next(iter(rows.values()))
        squares = [flat_rows(tensor).square().sum(1) for tensor in rows.values()]
        lengths = torch.stack(squares).sum(0).sqrt()
        # In float64, so that the same numbers are drawn in every precision.
        weights = torch.randn(rank, len(like), generator=generator, dtype=torch.float64).to(like)
        weights = weights / lengths.clamp_min(1e-30)
        combined = {name: torch.tensordot(weights, tensor, dims=1) for name, tensor in rows.items()}
        total = add(total, combined)
    return total
