r"""The gradient of one micro-batch and its derivative along a change of parameters, running statistics and weights.

.. math:: \dot g = \nabla^2 L\, \dot\theta + \partial_B \nabla L\, \dot B + \sum_b c_b \dot w_b \nabla \ell_b

The loss is linear in the weights, so the last term is the gradient of the loss with the change for its weights. Every
function here is the transpose of one of `linearised.py` and `chain.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.replay.along import along
from whence.replay.chain import Beginning, Cut, penalty_of
from whence.replay.linearised import Product, Tensors, free, nudged
from whence.replay.state import State
from whence.replay.transition import Piece
from whence.tree import Tree, add, each

Both = tuple[State, State]  # parameters and buffers before a piece, and the change of those that are free


@dataclass(frozen=True, slots=True)
class Pushed:
    """A piece's gradient, the buffers that it leaves, and the changes of the gradient and of the running ones."""

    gradient: Tree
    buffers: Tree
    gradient_change: Tree
    buffers_change: Tree


def pushed(piece: Piece, both: Both, *, weights: Tensor) -> Pushed:
    """Exact, by forward mode over reverse mode."""
    state, change = both
    trained, running = free(piece, state.params, state.buffers)

    def gradient(part: Tree, some: Tree, w: Tensor) -> tuple[Tree, Tree]:
        value, after, _ = piece.gradient(state.params | part, state.buffers | some, w)
        return value, after

    primals, tangents = (trained, running, torch.ones_like(weights)), (change.params, change.buffers, weights)
    (value, after), (slopes, left) = along(gradient, primals, tangents)
    return Pushed(value, after, slopes, {name: left[name] for name in running})


def pushed_apart(piece: Piece, both: Both, *, weights: Tensor) -> Pushed:
    """By central differences: two more gradients, and no kernel is differentiated twice or forward."""
    state, change = both
    trained, running = free(piece, state.params, state.buffers)
    size, moved = nudged(trained, change.params)

    def at(sign: float) -> tuple[Tree, Tree]:
        some = {name: tensor + sign * size * change.buffers[name] for name, tensor in running.items()}
        value, after, _ = piece.slopes(state.params | moved(sign), state.buffers | some, 1 + sign * size * weights)
        return value, {name: after[name] for name in running}

    value, after, _ = piece.slopes(state.params, state.buffers, None)
    slopes, left = (
        {name: (tensor - down[name]) / (2 * size) for name, tensor in up.items()}
        for up, down in zip(at(1.0), at(-1.0), strict=True)
    )
    return Pushed(value, after, slopes, left)


def pushed_through(piece: Piece, both: Both, *, weights: Tensor, cut: Cut, product: Product) -> Pushed:
    r"""With the curvature K of what follows a cut: :math:`J^\top (K J \dot\theta + \dot s)`, s the slopes there."""
    if not piece.counted:  # only its running statistics matter, and their way is exact
        return pushed(piece, both, weights=weights)
    state, change = both
    begun = Beginning.of(piece, state.params, state.buffers, cut=cut)
    ends, left = _ends(piece, both, cut=cut, product=product)
    with torch.enable_grad(), piece.randomness():
        head, added = (cut.head(piece, begun.outputs, w) for w in (torch.ones_like(weights), weights))
    curved, _ = head.curve(ends)
    slopes = tuple(map(torch.add, added.slopes, curved)) if curved else added.slopes
    gradient, bent = (begun.sloped(some, twice=False)[0] for some in (head.slopes, slopes))
    slope, bend = penalty_of(piece, state.params)
    if curved:
        bent = add(bent, {name: tensor for name, tensor in bend(change.params).items() if name in bent})
    gradient = {name: tensor + slope[name] if name in slope else tensor for name, tensor in gradient.items()}
    return Pushed(gradient, each(Tensor.detach, begun.after), each(Tensor.detach, bent), left)


def _ends(piece: Piece, both: Both, *, cut: Cut, product: Product) -> tuple[Tensors, Tree]:
    """The changes of the ends of the network, and of the running statistics that are left."""
    state, change = both
    trained, running = free(piece, state.params, state.buffers)

    def beginning(part: Tree, some: Tree) -> tuple[Tensors, Tree]:
        with piece.randomness():
            outputs, after = piece.transition.task.outputs(state.params | part, state.buffers | some, piece.batch)
            return cut.ends(piece, outputs), {name: after[name] for name in running}

    if product == "autograd":
        found: tuple[Tensors, Tree] = along(beginning, (trained, running), (change.params, change.buffers))[1]
        return found
    size, moved = nudged(trained, change.params)
    with torch.no_grad():
        up, down = (
            beginning(moved(sign), {name: t + sign * size * change.buffers[name] for name, t in running.items()})
            for sign in (1.0, -1.0)
        )
    ends = tuple((left - right) / (2 * size) for left, right in zip(up[0], down[0], strict=True))
    return ends, {name: (tensor - down[1][name]) / (2 * size) for name, tensor in up[1].items()}
