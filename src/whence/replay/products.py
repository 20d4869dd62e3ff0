r"""Inner products of directions with the gradients of a step's samples.

Of a few directions, no gradient is formed: the derivative of the samples' losses along a direction a holds all of them,
:math:`\langle a, \nabla\ell_b \rangle` for every slot b, and a loss that couples the samples of a batch is one such
function like any other. Of many, the samples' gradients are formed once, where each sample has one of its own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from whence.errors import CoupledLoss
from whence.replay.capture import watched
from whence.replay.curvature import Zero
from whence.replay.matrices import fast_products
from whence.replay.reverse import pull_rows, rows_of
from whence.replay.sides import Picked, Sides
from whence.replay.state import State
from whence.replay.transition import Piece
from whence.tree import Tree

# Directions from which on gradients of all samples cost no more than a derivative along each: on a perceptron as much
# at 64 and half at 256, on a transformer of 64 tokens a third already at 16 (processor time of whole attributions).
MANY = 64
ROOM = 256 * 2**20  # bytes that they may take
Found = tuple[Float[Tensor, "query slot"], Float[Tensor, " slot"], Tree]  # products, losses, and buffers behind


def slot_products(
    pieces: Sequence[Piece], state: State, directions: Tree, *, chunk: int
) -> tuple[Float[Tensor, "query slot"], Float[Tensor, " slot"]]:
    r"""The products :math:`c_b \langle a_q, \nabla\ell_b \rangle` at a state, and the losses.

    Args:
        pieces: the micro-batches of one step, in order.
        state: where the gradients are taken.
        directions: a, for the parameters that the step moves (others are ignored), `[query, ...]`.
        chunk: how many directions are multiplied at once.
    """
    scores, losses, at = [], [], state
    for piece in pieces:
        found = _by_gradients(piece, at, directions) or _by_tangents(piece, at, directions, chunk=chunk)
        scores.append(found[0])
        losses.append(found[1])
        at = State(state.params, found[2])
    return torch.cat(scores, 1), torch.cat(losses)


def _by_tangents(piece: Piece, state: State, directions: Tree, *, chunk: int) -> Found:
    """Along one direction after the other."""
    like = next(iter(directions.values()))
    with piece.transition.replaying(), fast_products():
        ones = torch.ones(len(piece.share)).to(like)
        linear = Zero().linearise(piece, state.params, state.buffers, weights=ones)
        if not piece.counted:
            return like.new_zeros(len(like), 0), linear.losses, linear.buffers
        blocks = [rows_of(directions, slice(first, first + chunk)) for first in range(0, len(like), chunk)]
        return torch.cat([pull_rows(linear, block, {})[2] for block in blocks]), linear.losses, linear.buffers


def _by_gradients(piece: Piece, state: State, directions: Tree) -> Found | None:
    """With the samples' gradients; None where they do not pay, or a sample has none of its own."""
    moving = {name: state.params[name] for name in piece.transition.moving if name in directions}
    like, number = next(iter(directions.values())), len(piece.share)
    size = number * sum(tensor.numel() for tensor in moving.values()) * like.element_size()
    if len(like) < MANY or size > ROOM or not piece.counted:
        return None
    found = watched(piece, state.params, state.buffers)
    if found.froze:
        return None
    try:
        (rows,) = found.rows([(None, {name: _whole(tensor) for name, tensor in moving.items()})])
    except CoupledLoss:
        return None
    parts = torch.split(rows, [tensor.numel() for tensor in moving.values()], 1)
    products = [directions[name].flatten(1) @ part.T for name, part in zip(moving, parts, strict=True)]
    return torch.stack(products).sum(0) * piece.share.to(like), found.losses, found.buffers


def _whole(parameter: Tensor) -> Sides:
    """All entries of a gradient, as they are."""
    sides = []
    for size in Sides.sizes(parameter.shape):
        every = torch.arange(size, device=parameter.device)
        sides.append(Picked(size, every, torch.ones_like(every, dtype=parameter.dtype)))
    return Sides(*sides)
