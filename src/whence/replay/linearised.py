r"""The gradient of one step and its transposed derivative, exact or by differences.

As a function of parameters, buffers and sample weights, the gradient has one transposed derivative that holds
everything a reverse sweep needs: with a the cotangent of the gradient and b that of the buffers,

.. math:: (\nabla^2 L\, a + B_\theta^\top b,\quad \partial_B,\quad c_b \langle a, \nabla \ell_b \rangle)

No per-sample gradient is formed, and losses that couple the samples of a batch (BatchNorm, contrastive) are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vjp

from whence.replay.transition import Piece
from whence.tree import Tree, add

Product = Literal["autograd", "difference"]
# (cotangent of the gradient, of the running buffers) -> (curvature product, of the running buffers, scores [slot])
Pull = Callable[[Tree, Tree], tuple[Tree, Tree, Tensor]]


@dataclass(frozen=True, slots=True)
class Linearised:
    """A piece's gradient at one point, the losses `[slot]`, the buffers it leaves, and its transposed derivative.

    Attributes:
        many: `pull` with a first axis of directions, where there is a better way than `vmap`.
    """

    gradient: Tree
    buffers: Tree
    losses: Tensor
    pull: Pull
    many: Pull | None = None


def differentiated(piece: Piece, params: Tree, buffers: Tree, *, weights: Tensor) -> Linearised:
    """Exact, by reverse mode over reverse mode."""
    trained, running = free(piece, params, buffers)

    def gradient(part: Tree, some: Tree, w: Tensor) -> tuple[tuple[Tree, Tree], tuple[Tree, Tensor]]:
        value, after, losses = piece.gradient(params | part, buffers | some, w)
        return (value, {name: after[name] for name in running}), (after, losses)

    (value, _), pull, (after, losses) = vjp(gradient, trained, running, weights, has_aux=True)  # type: ignore[misc]
    return Linearised(value, after, losses, lambda a, b: pull((a, b)))


def differenced(piece: Piece, params: Tree, buffers: Tree, *, weights: Tensor) -> Linearised:
    r"""By two more gradients a query.

    .. math:: \nabla^2 L\, a \approx (\nabla L(\theta + \epsilon a) - \nabla L(\theta - \epsilon a)) / 2 \epsilon

    The scores come from the losses of the same two passes. No graph outlives a pass, and no kernel is differentiated
    twice, so it takes training's own memory and runs on fused attention.
    """
    trained, running = free(piece, params, buffers)

    def at(part: Tree, some: Tree) -> tuple[tuple[Tree, Tree], tuple[Tree, Tensor]]:
        def loss(part: Tree, some: Tree) -> tuple[Tensor, tuple[Tree, Tensor]]:
            return piece.loss(params | part, buffers | some, weights)

        slopes, found = grad(loss, argnums=(0, 1), has_aux=True)(part, some)
        return slopes, found

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        size, moved = nudged(trained, a)
        (up, up_running), (_, up_losses) = at(moved(1.0), running)
        (down, down_running), (_, down_losses) = at(moved(-1.0), running)

        def slope(left: Tensor, right: Tensor) -> Tensor:
            return (left - right) / (2 * size)

        second = {name: slope(up[name], down[name]) for name in up}
        before = {name: slope(up_running[name], down_running[name]) for name in running}
        scores = piece.share.to(up_losses) * slope(up_losses, down_losses)
        if not running:
            return second, before, scores
        of_params, of_running = _pulled_statistics(piece, (params, buffers), b)
        return add(second, of_params), add(before, of_running), scores

    (value, _), (after, losses) = at(trained, running)
    return Linearised({name: value[name] for name in piece.transition.moving}, after, losses, pull)


def _pulled_statistics(piece: Piece, point: tuple[Tree, Tree], b: Tree) -> tuple[Tree, Tree]:
    """The cotangents b of the running statistics after a forward pass, taken back through it."""
    params, buffers = point

    def statistics(part: Tree, some: Tree) -> Tree:
        _, (after, _) = piece.loss(params | part, buffers | some, None)
        return {name: after[name] for name in b}

    pulled: tuple[Tree, Tree] = vjp(statistics, *free(piece, params, buffers))[1](b)
    return pulled


def free(piece: Piece, params: Tree, buffers: Tree) -> tuple[Tree, Tree]:
    """What a gradient is differentiated by: trained parameters and running statistics."""
    transition = piece.transition
    running = {name: buffers[name] for name in transition.task.running if name in buffers}
    return {name: params[name] for name in transition.trained}, running


def nudged(params: Tree, direction: Tree) -> tuple[Tensor, Callable[[float], Tree]]:
    r"""A step size :math:`\epsilon` for central differences along a direction, and the parameters moved by it.

    The move is a fixed share of the parameters' own norm, whatever the direction's: the cube root of the rounding unit
    balances rounding (1 / size) and curvature (size squared).
    """
    share = torch.finfo(next(iter(params.values())).dtype).eps ** (1 / 3)
    lengths = [torch.stack([torch.linalg.vector_norm(t) for t in tree.values()]).norm() for tree in (params, direction)]
    size = share * lengths[0] / torch.where(lengths[1] > 0, lengths[1], 1.0)

    def moved(sign: float) -> Tree:
        return params | {name: params[name] + sign * size * tensor for name, tensor in direction.items()}

    return size, moved
