r"""Inner products of directions with the gradients of a step's samples.

Few directions need no gradient of a sample: the derivative of the samples' losses along a direction
a is :math:`\langle a, \nabla\ell_b \rangle` for every slot b at once, also where the loss of a
sample depends on others in its batch. For many directions the per-sample gradients are formed once,
if each sample has one of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.accel.context import accelerated
from backtrail.curvature.policies import Zero
from backtrail.errors import CoupledLoss
from backtrail.persample.gradients import trace_gradient
from backtrail.persample.sketch import KroneckerSketch, Picked
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.sweep.adjoint import batched_vjp, select_queries
from backtrail.tree import Tree, flat_rows

# Directions from which on per-sample gradients cost no more than a derivative along each direction:
# on a perceptron as much at 64 and half at 256, on a transformer of 64 tokens a third already at 16
# (CPU time of whole attributions).
MANY = 64
# Bytes that the per-sample gradients of a micro-batch may take.
ROOM = 256 * 2**20


@final
@dataclass(frozen=True, slots=True)
class _Products:
    """Of one micro-batch: scores `[query, slot]`, losses `[slot]`, and the buffers after it."""

    scores: Tensor
    losses: Tensor
    buffers: Tree


def slot_products(
    micro_batches: Sequence[MicroBatch], state: State, directions: Tree, *, chunk: int
) -> tuple[Float[Tensor, "query slot"], Float[Tensor, " slot"]]:
    r"""Compute products :math:`c_b \langle a_q, \nabla\ell_b \rangle` and losses at a state.

    Args:
        micro_batches: Those of one step, in order.
        state: Where the gradients are taken.
        directions: The vectors a, for the parameters that the step updates (others are ignored),
            `[query, ...]`.
        chunk: How many directions are multiplied at once.
    """
    scores: list[Tensor] = []
    losses: list[Tensor] = []
    at = state
    for micro_batch in micro_batches:
        found = _by_gradients(micro_batch, at, directions)
        if found is None:
            found = _by_derivatives(micro_batch, at, directions, chunk=chunk)
        scores.append(found.scores)
        losses.append(found.losses)
        # The next micro-batch sees the BatchNorm statistics that this one left.
        at = State(state.params, found.buffers)
    return torch.cat(scores, 1), torch.cat(losses)


def _by_derivatives(
    micro_batch: MicroBatch, state: State, directions: Tree, *, chunk: int
) -> _Products:
    """Take the derivative of the losses along each direction, `chunk` directions at once."""
    like = next(iter(directions.values()))
    with micro_batch.transition.replaying(), accelerated():
        ones = torch.ones(len(micro_batch.share)).to(like)
        linear = Zero().gradient_vjp(micro_batch, state.params, state.buffers, weights=ones)
        if not micro_batch.contributes:
            return _Products(like.new_zeros(len(like), 0), linear.losses, linear.buffers)
        scores: list[Tensor] = []
        for first in range(0, len(like), chunk):
            block = select_queries(directions, slice(first, first + chunk))
            scores.append(batched_vjp(linear, block, {})[2])
        return _Products(torch.cat(scores), linear.losses, linear.buffers)


def _by_gradients(micro_batch: MicroBatch, state: State, directions: Tree) -> _Products | None:
    """Multiply with per-sample gradients; None if they do not pay, or a sample has none."""
    updated = {
        name: state.params[name] for name in micro_batch.transition.updated if name in directions
    }
    like = next(iter(directions.values()))
    entries = sum(tensor.numel() for tensor in updated.values())
    size = len(micro_batch.share) * entries * like.element_size()
    if len(like) < MANY or size > ROOM or not micro_batch.contributes:
        return None
    seen = trace_gradient(micro_batch, state.params, state.buffers)
    if seen.froze_statistics:
        return None
    whole = {name: _all_entries(tensor) for name, tensor in updated.items()}
    try:
        (gradients,) = seen.rows([(None, whole)])
    except CoupledLoss:
        return None
    by_parameter = torch.split(gradients, [tensor.numel() for tensor in updated.values()], 1)
    products: list[Tensor] = []
    for name, gradient in zip(updated, by_parameter, strict=True):
        products.append(flat_rows(directions[name]) @ gradient.T)
    scores = torch.stack(products).sum(0) * micro_batch.share.to(like)
    return _Products(scores, seen.losses, seen.buffers)


def _all_entries(parameter: Tensor) -> KroneckerSketch:
    """Make the sketch that keeps all entries of a gradient, as they are."""
    sides = []
    for size in KroneckerSketch.sizes(parameter.shape):
        every = torch.arange(size, device=parameter.device)
        ones = torch.ones_like(every, dtype=parameter.dtype)
        sides.append(Picked(size, every, ones))
    return KroneckerSketch(*sides)
