r"""The gradient of one step and its transposed derivative, exact or by differences.

As a function of parameters, buffers and sample weights, the gradient has one transposed derivative
that holds everything a reverse sweep needs: with a the cotangent of the gradient and b that of the
buffers,

.. math:: (\nabla^2 L\, a + B_\theta^\top b,\quad \partial_B,\quad c_b \langle a, \nabla \ell_b \rangle)

No per-sample gradient is formed, and losses that couple the samples of a batch (BatchNorm,
contrastive) are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap

from backtrail.accel.allocator import trim
from backtrail.accel.layers import DoubleBackwardMode
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, add, each

Tensors = tuple[Tensor, ...]
Product = Literal["autograd", "difference"]
# (cotangent of the gradient, of the running buffers) -> (curvature product, of the running buffers,
# scores [slot])
Pull = Callable[[Tree, Tree], tuple[Tree, Tree, Tensor]]


@dataclass(frozen=True, slots=True)
class GradientVJP:
    """A piece's gradient at one point, the losses `[slot]`, the buffers it leaves, and its transposed derivative.

    Attributes:
        many: `pull` with a first axis of directions, where there is a better way than `vmap`.
    """

    gradient: Tree
    buffers: Tree
    losses: Tensor
    pull: Pull
    many: Pull | None = None


def differentiated(
    micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
) -> GradientVJP:
    """Exact, by reverse mode over reverse mode."""
    trained, running = (leaves(tree) for tree in free(micro_batch, params, buffers))
    moving, w = (
        {name: trained[name] for name in micro_batch.transition.updated},
        weights.detach().requires_grad_(),
    )
    with torch.enable_grad(), DoubleBackwardMode():
        total, (after, losses) = micro_batch.loss(params | trained, buffers | running, w)
        gradient = transposed(
            (total,), tuple(moving.values()), (torch.ones_like(total),), create_graph=True
        )

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        outputs = (*gradient, *(after[name] for name in b))
        given = (*(a[name] for name in moving), *b.values())
        *found, scores = transposed(outputs, (*trained.values(), *running.values(), w), given)
        return (
            dict(zip(trained, found, strict=False)),
            dict(zip(running, found[len(trained) :], strict=True)),
            scores,
        )

    value = dict(zip(moving, (tensor.detach() for tensor in gradient), strict=True))
    return GradientVJP(value, each(Tensor.detach, after), losses.detach(), pull)


def differenced(
    micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
) -> GradientVJP:
    r"""By two more gradients a query.

    .. math:: \nabla^2 L\, a \approx (\nabla L(\theta + \epsilon a) - \nabla L(\theta - \epsilon a)) / 2 \epsilon

    The scores come from the losses of the same two passes. No graph outlives a pass, and no kernel
    is differentiated twice, so it takes training's own memory and runs on fused attention.
    """
    trained, running = free(micro_batch, params, buffers)

    def loss(part: Tree, some: Tree) -> tuple[Tensor, tuple[Tree, Tensor]]:
        return micro_batch.loss(params | part, buffers | some, weights)

    def statistics(b: Tree) -> tuple[Tree, Tree]:
        return _pulled_statistics(micro_batch, (params, buffers), b) if running else ({}, {})

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        return _between(
            loss, nudged(trained, a), running, share=micro_batch.share, passed=statistics(b)
        )

    def many(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        sizes = vmap(lambda one: nudged(trained, one)[0])(a)
        nudge = sizes, lambda sign: vmap(lambda one: nudged(trained, one)[1](sign))(a)
        begun = each(lambda tensor: tensor.expand(len(sizes), *tensor.shape), running)
        passed = vmap(statistics)(b) if running else ({}, {})
        return _between(
            vmap(loss, randomness="same"), nudge, begun, share=micro_batch.share, passed=passed
        )

    value, _, (after, losses) = _slopes(loss, trained, running)
    return GradientVJP(
        {name: value[name] for name in micro_batch.transition.updated}, after, losses, pull, many
    )


Loss = Callable[
    [Tree, Tree], tuple[Tensor, tuple[Tree, Tensor]]
]  # (value or values, (buffers left, losses [slot]))
Nudge = tuple[
    Tensor, Callable[[float], Tree]
]  # a step size, and the parameters after a step of this sign


def _between(
    loss: Loss, nudge: Nudge, running: Tree, *, share: Tensor, passed: tuple[Tree, Tree]
) -> tuple[Tree, Tree, Tensor]:
    """Central differences of gradient and losses, beside what the statistics left have passed back."""
    size, moved = nudge
    second, before, (_, up) = _slopes(loss, moved(1.0), running)
    subtracted, passed_on, (_, down) = _slopes(loss, moved(-1.0), running)

    def slope(left: Tensor, right: Tensor) -> Tensor:  # in the memory of the first
        return left.sub_(right).div_(
            (2 * size).reshape(size.shape + (1,) * (left.dim() - size.dim()))
        )

    second = {name: slope(tensor, subtracted[name]) for name, tensor in second.items()}
    before = {name: slope(tensor, passed_on[name]) for name, tensor in before.items()}
    return add(second, passed[0]), add(before, passed[1]), share.to(up) * slope(up, down)


def _slopes(loss: Loss, part: Tree, some: Tree) -> tuple[Tree, Tree, tuple[Tree, Tensor]]:
    """Gradients of a loss, or of many that share nothing, by parameters and running statistics.

    As training takes them: `torch.func.grad` would keep the whole graph until the end, for a
    derivative of its own.
    """
    leaves = {
        place: tensor.detach().requires_grad_()
        for place, tensor in enumerate((*part.values(), *some.values()))
    }
    with torch.enable_grad():
        values, (after, losses) = loss(
            {name: leaves[place] for place, name in enumerate(part)},
            {name: leaves[place] for place, name in enumerate(some, len(part))},
        )
    total, inputs = values.sum(), tuple(leaves.values())
    after, losses = each(Tensor.detach, after), losses.detach()
    if not total.requires_grad:  # nothing of this piece counts
        slopes = tuple(torch.zeros_like(leaf) for leaf in inputs)
    else:
        slopes = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    trim()  # or the next pass takes new memory beside the holes that this one leaves
    return (
        dict(zip(part, slopes, strict=False)),
        dict(zip(some, slopes[len(part) :], strict=True)),
        (after, losses),
    )


def _pulled_statistics(
    micro_batch: MicroBatch, point: tuple[Tree, Tree], b: Tree
) -> tuple[Tree, Tree]:
    """The cotangents b of the running statistics after a forward pass, taken back through it."""
    params, buffers = point

    def statistics(part: Tree, some: Tree) -> Tree:
        _, (after, _) = micro_batch.loss(params | part, buffers | some, None)
        return {name: after[name] for name in b}

    pulled: tuple[Tree, Tree] = vjp(statistics, *free(micro_batch, params, buffers))[1](b)
    return pulled


def free(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> tuple[Tree, Tree]:
    """What a gradient is differentiated by: trained parameters and running statistics."""
    transition = micro_batch.transition
    running = {name: buffers[name] for name in transition.task.running if name in buffers}
    return {name: params[name] for name in transition.trained}, running


def leaves(tree: Tree) -> Tree:
    """The same tensors, to be differentiated by."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tree.items()}


def transposed(
    outputs: Tensors, inputs: Tensors, cotangents: Tensors, *, create_graph: bool = False
) -> Tensors:
    """Transposed product; the graph is kept, and what nothing depends on has zero."""
    pairs = [
        (output, c) for output, c in zip(outputs, cotangents, strict=True) if output.requires_grad
    ]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [c for _, c in pairs],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def nudged(params: Tree, direction: Tree) -> Nudge:
    r"""A step size :math:`\epsilon` for central differences along a direction, and the parameters moved by it.

    The move is a fixed share of the parameters' own norm, whatever the direction's: the cube root
    of the rounding unit balances rounding (1 / size) and curvature (size squared).
    """
    share = torch.finfo(next(iter(params.values())).dtype).eps ** (1 / 3)
    lengths = [
        torch.stack([torch.linalg.vector_norm(t) for t in tree.values()]).norm()
        for tree in (params, direction)
    ]
    size = share * lengths[0] / torch.where(lengths[1] > 0, lengths[1], 1.0)

    def moved(sign: float) -> Tree:
        return params | {
            name: params[name] + sign * size * tensor for name, tensor in direction.items()
        }

    return size, moved
