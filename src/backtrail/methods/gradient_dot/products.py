r"""Inner products of directions with the gradients of a step's samples.

Of a few directions, no gradient is formed: the derivative of the samples' losses along a direction
a holds all of them, :math:`\langle a, \nabla\ell_b \rangle` for every slot b, and a loss that
couples the samples of a batch is one such function like any other. Of many, the samples' gradients
are formed once, where each sample has one of its own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.accel.context import accelerated
from backtrail.curvature.policies import Zero
from backtrail.errors import CoupledLoss
from backtrail.persample.gradients import watched
from backtrail.persample.sketch import KroneckerSketch, Picked
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.sweep.adjoint import pull_rows, rows_of
from backtrail.tree import Tree

# Directions from which on gradients of all samples cost no more than a derivative along each: on a
# perceptron as much at 64 and half at 256, on a transformer of 64 tokens a third already at 16
# (processor time of whole attributions).
MANY = 64
ROOM = 256 * 2**20  # bytes that they may take
Found = tuple[
    Float[Tensor, "query slot"], Float[Tensor, " slot"], Tree
]  # products, losses, and buffers behind


def slot_products(
    micro_batches: Sequence[MicroBatch], state: State, directions: Tree, *, chunk: int
) -> tuple[Float[Tensor, "query slot"], Float[Tensor, " slot"]]:
    r"""The products :math:`c_b \langle a_q, \nabla\ell_b \rangle` at a state, and the losses.

    Args:
        micro_batches: the micro-batches of one step, in order.
        state: where the gradients are taken.
        directions: a, for the parameters that the step moves (others are ignored), `[query, ...]`.
        chunk: how many directions are multiplied at once.
    """
    scores, losses, at = [], [], state
    for micro_batch in micro_batches:
        found = _by_gradients(micro_batch, at, directions) or _by_tangents(
            micro_batch, at, directions, chunk=chunk
        )
        scores.append(found[0])
        losses.append(found[1])
        at = State(state.params, found[2])
    return torch.cat(scores, 1), torch.cat(losses)


def _by_tangents(micro_batch: MicroBatch, state: State, directions: Tree, *, chunk: int) -> Found:
    """Along one direction after the other."""
    like = next(iter(directions.values()))
    with micro_batch.transition.replaying(), accelerated():
        ones = torch.ones(len(micro_batch.share)).to(like)
        linear = Zero().gradient_vjp(micro_batch, state.params, state.buffers, weights=ones)
        if not micro_batch.contributes:
            return like.new_zeros(len(like), 0), linear.losses, linear.buffers
        blocks = [
            rows_of(directions, slice(first, first + chunk)) for first in range(0, len(like), chunk)
        ]
        return (
            torch.cat([pull_rows(linear, block, {})[2] for block in blocks]),
            linear.losses,
            linear.buffers,
        )


def _by_gradients(micro_batch: MicroBatch, state: State, directions: Tree) -> Found | None:
    """With the samples' gradients; None where they do not pay, or a sample has none of its own."""
    moving = {
        name: state.params[name] for name in micro_batch.transition.updated if name in directions
    }
    like, number = next(iter(directions.values())), len(micro_batch.share)
    size = number * sum(tensor.numel() for tensor in moving.values()) * like.element_size()
    if len(like) < MANY or size > ROOM or not micro_batch.contributes:
        return None
    found = watched(micro_batch, state.params, state.buffers)
    if found.froze_statistics:
        return None
    try:
        (rows,) = found.rows([(None, {name: _whole(tensor) for name, tensor in moving.items()})])
    except CoupledLoss:
        return None
    parts = torch.split(rows, [tensor.numel() for tensor in moving.values()], 1)
    products = [
        directions[name].flatten(1) @ part.T for name, part in zip(moving, parts, strict=True)
    ]
    return torch.stack(products).sum(0) * micro_batch.share.to(like), found.losses, found.buffers


def _whole(parameter: Tensor) -> KroneckerSketch:
    """All entries of a gradient, as they are."""
    sides = []
    for size in KroneckerSketch.sizes(parameter.shape):
        every = torch.arange(size, device=parameter.device)
        sides.append(Picked(size, every, torch.ones_like(every, dtype=parameter.dtype)))
    return KroneckerSketch(*sides)
