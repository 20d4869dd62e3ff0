r"""Inner products of directions with the gradients of a step's samples, none of which is ever formed.

The derivative of the samples' losses along a direction a holds all of them: :math:`\langle a, \nabla\ell_b \rangle`
for every slot b. A loss that couples the samples of a batch is one such function like any other.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from whence.replay.curvature import Zero
from whence.replay.reverse import pull_rows, rows_of
from whence.replay.state import State
from whence.replay.transition import Piece
from whence.tree import Tree


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
    like = next(iter(directions.values()))
    scores, losses, buffers = [], [], state.buffers
    with pieces[0].transition.replaying():
        for piece in pieces:
            ones = torch.ones(len(piece.share)).to(like)
            linear = Zero().linearise(piece, state.params, buffers, weights=ones)
            losses.append(linear.losses)
            buffers = linear.buffers
            if piece.counted:
                blocks = [rows_of(directions, slice(first, first + chunk)) for first in range(0, len(like), chunk)]
                scores.append(torch.cat([pull_rows(linear, block, {})[2] for block in blocks]))
    return torch.cat(scores, 1), torch.cat(losses)
