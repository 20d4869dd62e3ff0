r"""Curvature between many pairs of gradients, through the few directions that gradients of rows mostly lie in.

With an orthonormal basis Q of such directions and W = H Q, what a pair has inside the span is
exact, and so is what passes between inside and outside; only the curvature between the two parts
outside is left out:

.. math:: a^\top H b \approx (Q a)^\top W b + (W a)^\top Q b - (Q a)^\top (Q W^\top) (Q b)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.methods.diff_in.row_gradients import products
from backtrail.tree import Tree, add, joined


@final
@dataclass(frozen=True, slots=True)
class Subspace:
    """Some directions, and the curvature products with them.

    Attributes:
        directions: Q, and behind it W, `[direction, ...]`.
        inner: how what two vectors have along them is paired: (-Q W, 1; 1, 0).
    """

    directions: Tree
    inner: Tensor

    @staticmethod
    def spanned(directions: Tree, curve: Callable[[Tree], Tree]) -> "Subspace":
        """What some directions span."""
        basis = orthonormal(directions)
        curved = curve(basis)
        within = products(basis, curved)
        one = torch.eye(len(within)).to(within)
        inner = torch.cat(
            [torch.cat([-within, one], 1), torch.cat([one, torch.zeros_like(one)], 1)]
        )
        return Subspace(joined([basis, curved]), inner)

    def bilinear(self, left: Tree, right: Tree) -> Float[Tensor, " row"]:
        """The products of two stacks through the curvature, row by row."""
        ours = products(self.directions, left)
        theirs = ours if right is left else products(self.directions, right)
        return (ours * (self.inner @ theirs)).sum(0)


def orthonormal(directions: Tree) -> Tree:
    """An orthonormal basis of the span of a stack."""
    flat = torch.cat([tensor.flatten(1) for tensor in directions.values()], 1)
    basis = torch.linalg.qr(flat.T)[0].T
    parts = torch.split(basis, [tensor[0].numel() for tensor in directions.values()], 1)
    return {
        name: part.reshape(-1, *directions[name].shape[1:])
        for name, part in zip(directions, parts, strict=True)
    }


def mixed(stacks: Iterable[Tree], rank: int) -> Tree:
    """Random combinations of the rows of some stacks: they span what the rows mostly lie in.

    Every row counts the same, however long: a wrong label's gradient is not to hide the others'.
    """
    draw = torch.Generator().manual_seed(0)
    total: Tree = {}
    for rows in stacks:
        like = next(iter(rows.values()))
        sizes = (
            torch.stack([tensor.flatten(1).square().sum(1) for tensor in rows.values()])
            .sum(0)
            .sqrt()
        )
        weights = torch.randn(rank, len(like), generator=draw, dtype=torch.float64).to(like)
        weights = weights / sizes.clamp_min(1e-30)
        part = {name: torch.tensordot(weights, tensor, dims=1) for name, tensor in rows.items()}
        total = add(total, part)
    return total
