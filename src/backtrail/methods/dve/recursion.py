r"""The backward recursion of Data Value Embedding (Wang et al., arXiv 2412.09538), for one block of coordinates.

A change of the state before step t becomes, at the end, the change times

.. math:: P_t = \prod_{k \ge t} \Big(\mathrm{diag}(\rho_k) - \hat X_k^\top W_k\, \hat G_k\Big),

later steps on the left: :math:`\rho` is what weight decay leaves, the rows of :math:`\hat G` are
the gradients that the curvature is made of, those of :math:`\hat X` what the update makes of them.
Kept is the lost part L of :math:`P = \mathrm{diag}(s) - L`, as rows while they are few, then as a
matrix; 1 - L would round it away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.errors import EmbeddingGrew

GROWTH = 1e4  # beyond it float32 keeps fewer than three digits of what cancels


@final
@dataclass(frozen=True, slots=True)
class Visits:
    """What one step says about a block of coordinates.

    Attributes:
        share: the factor c of every slot.
        moved: what the update makes of every slot's gradient.
        fisher_share: the factor of every row that the curvature is made of.
        fisher: the gradients that the curvature is made of.
        fisher_moved: what the update makes of those.
        decay: what the step leaves of every coordinate where gradients are zero.
    """

    share: Float[Tensor, " slot"]
    moved: Float[Tensor, "slot rank"]
    fisher_share: Float[Tensor, " row"]
    fisher: Float[Tensor, "row rank"]
    fisher_moved: Float[Tensor, "row rank"]
    decay: Float[Tensor, " rank"]


@final
class Propagator:
    """P: what a change of some coordinates after a step becomes at the end. It starts as the identity.

    >>> there = Propagator(torch.zeros(2))
    >>> there.step_back(
    ...     there(torch.tensor([[0.5, 0.0]])), torch.tensor([[1.0, 1.0]]), torch.ones(2)
    ... )
    >>> there.matrix()
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  1.0000]])
    """

    def __init__(self, like: Float[Tensor, " rank"]) -> None:
        self._scale = torch.ones_like(like)
        self._left = self._right = like.new_zeros(0, len(like))
        self._lost: Tensor | None = None

    def __call__(self, rows: Float[Tensor, "row rank"]) -> Float[Tensor, "row rank"]:
        """P applied to every row."""
        if self._lost is not None:
            return rows * self._scale - rows @ self._lost.T
        return rows * self._scale - (rows @ self._right.T) @ self._left

    def back(self, rows: Float[Tensor, "row rank"]) -> Float[Tensor, "row rank"]:
        """The transpose of P applied to every row: from derivatives at the end to those after the step."""
        if self._lost is not None:
            return rows * self._scale - rows @ self._lost
        return rows * self._scale - (rows @ self._left.T) @ self._right

    def step_back(
        self,
        left: Float[Tensor, "row rank"],
        fisher: Float[Tensor, "row rank"],
        decay: Float[Tensor, " rank"],
    ) -> None:
        """Go back over a step: P becomes P diag(decay) - leftᵀ fisher, where P was applied to the left rows already."""
        self._scale = self._scale * decay
        if self._lost is None and len(self._left) + len(left) < len(decay):
            self._left = torch.cat([self._left, left])
            self._right = torch.cat([self._right * decay, fisher])
            return
        lost = self._left.T @ self._right if self._lost is None else self._lost
        self._lost = (lost * decay).addmm_(left.T, fisher)
        self._left = self._right = left[:0]

    def matrix(self) -> Float[Tensor, "rank rank"]:
        """P itself."""
        return self(torch.eye(len(self._scale)).to(self._scale)).T


def back_over(
    visits: Visits,
    transport: Propagator,
    *,
    weights: Float[Tensor, "row row"],
    step: int,
    block: str,
) -> Float[Tensor, "slot rank"]:
    r"""What every slot of a step moved the end by, and P taken back over the step.

    .. math:: E_t = c\, X_t P_{t+1}^\top

    Args:
        visits: the step.
        transport: P behind it.
        weights: of the step's curvature in the block, see `weights`.
        step: its number, for an error.
        block: name of the coordinates, for an error.

    Raises:
        EmbeddingGrew: rows grew beyond all measure, or are not finite.
    """
    slots, same = len(visits.share), visits.fisher_moved is visits.moved
    carried = transport(visits.moved if same else torch.cat([visits.moved, visits.fisher_moved]))
    found, drawn = carried[:slots], carried[-len(visits.fisher) :]
    growth = _growth(found, visits.moved)
    if not growth <= GROWTH:
        raise EmbeddingGrew(step, block, growth)
    transport.step_back(weights.T @ drawn, visits.fisher, visits.decay)
    return visits.share[:, None] * found


def weights(blocks: Sequence[Visits], damping: float) -> Float[Tensor, "block row row"]:
    r"""The matrices W of a step's curvature :math:`\hat X^\top W \hat G`, damped, of all its blocks at once.

    .. math:: W = C (1 + \kappa\, \hat G \hat X^\top C)^{-1}

    An eigenvalue λ of the step (rate times curvature) then takes :math:`\lambda / (1 + \kappa
    \lambda)` away instead of λ: nothing is damped at κ = 0, no step overshoots its minimum's mirror
    image from κ = 1/2 on, and κ = 1 is an implicit step.
    """
    share = torch.diag(blocks[0].fisher_share).expand(len(blocks), -1, -1)
    if not damping:
        return share
    inner = (
        damping
        * torch.stack([one.fisher @ one.fisher_moved.T for one in blocks])
        * blocks[0].fisher_share
    )
    inner.diagonal(dim1=1, dim2=2).add_(1)
    found: Tensor = torch.linalg.solve(inner, share, left=False)
    return found


def _growth(after: Tensor, before: Tensor) -> float:
    """The largest factor by which a row grew; NaN where one is not a number."""
    if not len(after):
        return 0.0
    starts = before.square().sum(1).clamp_min(torch.finfo(before.dtype).tiny)
    return math.sqrt(float((after.square().sum(1) / starts).max()))
