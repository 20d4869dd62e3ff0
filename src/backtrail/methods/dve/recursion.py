r"""The backward recursion of Data Value Embedding (arXiv 2412.09538), for one block of coordinates.

A change of the state before step t becomes, at the end of the training, the change times

.. math:: P_t = \prod_{k \ge t} \Big(\mathrm{diag}(\rho_k) - \hat X_k^\top W_k\, \hat G_k\Big),

later steps on the left. :math:`\rho` is what weight decay leaves of a coordinate, the rows of
:math:`\hat G` are the gradients that the curvature consists of, and the rows of :math:`\hat X` are
what the update makes of them.

Stored is the subtracted part L of :math:`P = \mathrm{diag}(s) - L`, as factors of low rank while
there are few rows, then as a matrix. Storing P itself would lose L to rounding, since 1 - L is
close to 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.errors import EmbeddingGrew

# Growth of a row beyond which float32 keeps fewer than three digits of what later cancels.
LARGEST_GROWTH = 1e4


@final
@dataclass(frozen=True, slots=True)
class Visits:
    """What one step says about a block of coordinates.

    Attributes:
        share: Factor c of every slot in the step's loss.
        moved: What the update makes of every slot's gradient.
        fisher_share: Factor of every row of the curvature.
        fisher: The gradients that the curvature consists of.
        fisher_moved: What the update makes of those.
        decay: What the step leaves of every coordinate where gradients are zero.
    """

    share: Float[Tensor, " slot"]
    moved: Float[Tensor, "slot rank"]
    fisher_share: Float[Tensor, " row"]
    fisher: Float[Tensor, "row rank"]
    fisher_moved: Float[Tensor, "row rank"]
    decay: Float[Tensor, " rank"]


@final
class Propagator:
    """The matrix P: what a change of some coordinates after a step becomes at the end.

    It begins as the identity, after the last step.

    >>> propagator = Propagator(torch.zeros(2))
    >>> left = propagator(torch.tensor([[0.5, 0.0]]))
    >>> propagator.step_back(left, torch.tensor([[1.0, 1.0]]), torch.ones(2))
    >>> propagator.matrix()
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  1.0000]])
    """

    def __init__(self, like: Float[Tensor, " rank"]) -> None:
        # P = diag(scale) - left^T right, or diag(scale) - subtracted once that is smaller.
        self._scale = torch.ones_like(like)
        self._left = like.new_zeros(0, len(like))
        self._right = like.new_zeros(0, len(like))
        self._subtracted: Tensor | None = None

    def __call__(self, rows: Float[Tensor, "row rank"]) -> Float[Tensor, "row rank"]:
        """P applied to every row."""
        if self._subtracted is not None:
            return rows * self._scale - rows @ self._subtracted.T
        return rows * self._scale - (rows @ self._right.T) @ self._left

    def transposed(self, rows: Float[Tensor, "row rank"]) -> Float[Tensor, "row rank"]:
        """The transpose of P applied to every row: derivatives at the end become earlier ones."""
        if self._subtracted is not None:
            return rows * self._scale - rows @ self._subtracted
        return rows * self._scale - (rows @ self._left.T) @ self._right

    def step_back(
        self,
        left: Float[Tensor, "row rank"],
        fisher: Float[Tensor, "row rank"],
        decay: Float[Tensor, " rank"],
    ) -> None:
        """Include one earlier step: P becomes P diag(decay) - left^T fisher.

        Args:
            left: Rows to which P was applied already.
            fisher: The gradients that the step's curvature consists of.
            decay: What the step leaves of every coordinate.
        """
        self._scale = self._scale * decay
        rank = len(decay)
        if self._subtracted is None and len(self._left) + len(left) < rank:
            self._left = torch.cat([self._left, left])
            self._right = torch.cat([self._right * decay, fisher])
            return
        if self._subtracted is None:
            self._subtracted = self._left.T @ self._right
            self._left = left[:0]
            self._right = left[:0]
        self._subtracted = (self._subtracted * decay).addmm_(left.T, fisher)

    def matrix(self) -> Float[Tensor, "rank rank"]:
        """P as a matrix."""
        identity = torch.eye(len(self._scale)).to(self._scale)
        return self(identity).T


def embed_step(
    visits: Visits,
    propagator: Propagator,
    *,
    weights: Float[Tensor, "row row"],
    step: int,
    block: str,
) -> Float[Tensor, "slot rank"]:
    r"""The embeddings of a step's slots; afterwards the propagator includes the step.

    .. math:: E_t = c\, X_t P_{t+1}^\top

    Args:
        visits: The step.
        propagator: P behind the step; it is changed in place.
        weights: Of the step's curvature in the block, see `curvature_weights`.
        step: Its number, for an error.
        block: Name of the coordinates, for an error.

    Raises:
        EmbeddingGrew: Rows grew beyond `LARGEST_GROWTH`, or are not finite.
    """
    slots = len(visits.share)
    # With the empirical Fisher matrix both sets of rows are the same tensor: P is applied once.
    if visits.fisher_moved is visits.moved:
        rows = visits.moved
    else:
        rows = torch.cat([visits.moved, visits.fisher_moved])
    at_end = propagator(rows)
    moved_at_end = at_end[:slots]
    fisher_at_end = at_end[-len(visits.fisher) :]
    growth = _growth(moved_at_end, visits.moved)
    # Written so that NaN is refused, too.
    if not growth <= LARGEST_GROWTH:
        raise EmbeddingGrew(step, block, growth)
    propagator.step_back(weights.T @ fisher_at_end, visits.fisher, visits.decay)
    return visits.share[:, None] * moved_at_end


def curvature_weights(blocks: Sequence[Visits], damping: float) -> Float[Tensor, "block row row"]:
    r"""The matrices W of a step's damped curvature :math:`\hat X^\top W \hat G`, of all its blocks.

    .. math:: W = C (1 + \kappa\, \hat G \hat X^\top C)^{-1}

    An eigenvalue λ of the step (learning rate times curvature) then subtracts
    :math:`\lambda / (1 + \kappa \lambda)` instead of λ. With κ = 0 nothing is damped; from
    κ = 1/2 on no step overshoots by more than its distance from the minimum; κ = 1 is an implicit
    (backward Euler) step.

    Args:
        blocks: What the step says about each block of coordinates.
        damping: κ.
    """
    fisher_share = blocks[0].fisher_share
    undamped = torch.diag(fisher_share).expand(len(blocks), -1, -1)
    if not damping:
        return undamped
    products = torch.stack([block.fisher @ block.fisher_moved.T for block in blocks])
    system = damping * products * fisher_share
    system.diagonal(dim1=1, dim2=2).add_(1)
    weights: Tensor = torch.linalg.solve(system, undamped, left=False)
    return weights


def _growth(after: Tensor, before: Tensor) -> float:
    """Largest factor by which the length of a row grew; NaN where a row is not finite."""
    if not len(after):
        return 0.0
    smallest = torch.finfo(before.dtype).tiny
    before_squared = before.square().sum(1).clamp_min(smallest)
    return math.sqrt(float((after.square().sum(1) / before_squared).max()))
