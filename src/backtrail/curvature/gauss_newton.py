r"""Curvature by the chain rule: what bends is only the end of the loss, seen through a linearised beginning.

The network is cut at its *ends* e: its outputs, or already the samples' losses. With J their
derivative by the parameters and K a curvature of what is left, the product with a is :math:`J^\top
K J a`.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from backtrail.accel.layers import DoubleBackwardMode
from backtrail.accel.second_order import straight
from backtrail.curvature.vjp import (
    GradientVJP,
    Product,
    Tensors,
    differentiated,
    free,
    leaves,
    nudged,
    transposed,
)
from backtrail.errors import NoOutputs
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, add


@dataclass(frozen=True, slots=True)
class LossHead:
    """What is left of a piece's loss after its ends.

    Attributes:
        slopes: of the loss by the ends.
        curve: from a tangent of the ends to K times it (nothing where K is zero), and the scores
            `[slot]`.
        losses: of the samples, `[slot]`.
    """

    slopes: Tensors
    curve: Callable[[Tensors], tuple[Tensors, Tensor]]
    losses: Tensor


class SplitPoint(abc.ABC):
    """Says where a network ends, and how what follows bends."""

    @abc.abstractmethod
    def ends(self, micro_batch: MicroBatch, outputs: Any) -> Tensors:
        """The ends, out of what the model returned."""

    @abc.abstractmethod
    def head(self, micro_batch: MicroBatch, outputs: Any, weights: Tensor) -> LossHead:
        """The loss as a function of the ends, at these sample weights."""


@final
class AtOutputs(SplitPoint):
    """Cut at the model's outputs: K is the loss's second derivative by them, the Gauss-Newton matrix."""

    def ends(self, micro_batch: MicroBatch, outputs: Any) -> Tensors:
        """All floating tensors among the outputs.

        Raises:
            NoOutputs: there are none.
        """
        del micro_batch
        found = tuple(leaf for leaf in tree_flatten(outputs)[0] if _floating(leaf))
        if not found:
            raise NoOutputs(type(outputs).__name__)
        return found

    def head(self, micro_batch: MicroBatch, outputs: Any, weights: Tensor) -> LossHead:
        """By one transposed derivative of the slopes with respect to ends and weights."""
        leaves, spec = tree_flatten(outputs)

        def loss(ends: Tensors, w: Tensor) -> tuple[Tensor, Tensor]:
            given = iter(ends)
            filled = [next(given) if _floating(leaf) else leaf for leaf in leaves]
            losses = micro_batch.transition.task.losses_of(
                tree_unflatten(filled, spec), micro_batch.batch
            )
            return micro_batch.weighted(losses, w), losses

        ends = tuple(end.detach() for end in self.ends(micro_batch, outputs))
        slopes, curve, losses = vjp(grad(loss, has_aux=True), ends, weights, has_aux=True)  # type: ignore[misc]
        return LossHead(slopes, curve, losses)


@final
@dataclass(frozen=True, slots=True)
class AtLosses(SplitPoint):
    """Cut at the samples' losses: K = diag(c w), the empirical Fisher matrix, or K = 0."""

    bends: bool

    def ends(self, micro_batch: MicroBatch, outputs: Any) -> Tensors:
        """The losses."""
        return (micro_batch.transition.task.losses_of(outputs, micro_batch.batch),)

    def head(self, micro_batch: MicroBatch, outputs: Any, weights: Tensor) -> LossHead:
        """A weighted sum."""
        (losses,) = self.ends(micro_batch, outputs)
        share = micro_batch.share.to(losses)

        def curve(tangent: Tensors) -> tuple[Tensors, Tensor]:
            scores = share * tangent[0]
            return (weights * scores,) if self.bends else (), scores

        return LossHead((share * weights,), curve, losses.detach())


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def through(
    micro_batch: MicroBatch,
    params: Tree,
    buffers: Tree,
    *,
    weights: Tensor,
    cut: SplitPoint,
    product: Product,
) -> GradientVJP:
    """Gradient of a piece, and products with the curvature of what follows a cut; a penalty keeps its own."""
    if not micro_batch.contributes:  # only its running statistics matter, and their way is exact
        return differentiated(micro_batch, params, buffers, weights=weights)
    with DoubleBackwardMode():
        begun = Backbone.of(micro_batch, params, buffers, cut=cut)
    with torch.enable_grad(), micro_batch.randomness():
        head = cut.head(micro_batch, begun.outputs, weights)
    gradient, push = begun.sloped(head.slopes, twice=product == "autograd")
    if product == "difference":
        push = _differences(micro_batch, params, buffers, cut=cut)
    slope, bend = penalty_of(micro_batch, params)

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        curved, scores = head.curve(push(a))
        second, before = begun.pull(curved, b)
        return add(second, bend(a)) if curved else second, before, scores

    value = {
        name: tensor + slope[name] if name in slope else tensor for name, tensor in gradient.items()
    }
    return GradientVJP(
        value, {name: tensor.detach() for name, tensor in begun.after.items()}, head.losses, pull
    )


@dataclass(frozen=True, slots=True)
class Backbone:
    """The graph of one forward pass up to the cut, with parameters and running statistics as its leaves."""

    moving: Tree
    trained: Tree
    running: Tree
    outputs: Any
    ends: Tensors
    after: Tree

    @staticmethod
    def of(micro_batch: MicroBatch, params: Tree, buffers: Tree, *, cut: SplitPoint) -> "Backbone":
        """Run it forward once."""
        trained, running = (leaves(tree) for tree in free(micro_batch, params, buffers))
        with torch.enable_grad(), micro_batch.randomness():
            outputs, after = micro_batch.transition.task.outputs(
                params | trained, buffers | running, micro_batch.batch
            )
            ends = cut.ends(micro_batch, outputs)
        moving = {name: trained[name] for name in micro_batch.transition.updated}
        return Backbone(moving, trained, running, outputs, ends, after)

    def sloped(self, slopes: Tensors, *, twice: bool) -> tuple[Tree, Callable[[Tree], Tensors]]:
        """The gradient, and from a direction a of the parameters to the tangent J a of the ends.

        The gradient is linear in the slopes, so J a is its transposed derivative by them: no
        forward mode needed.
        """
        knobs = tuple(slope.detach().requires_grad_(twice) for slope in slopes)
        with torch.enable_grad(), straight():
            found = transposed(self.ends, tuple(self.moving.values()), knobs, create_graph=twice)
        gradient = dict(zip(self.moving, found, strict=True))

        def push(a: Tree) -> Tensors:
            return transposed(tuple(gradient.values()), knobs, tuple(a[name] for name in gradient))

        return {name: tensor.detach() for name, tensor in gradient.items()}, push

    def pull(self, curved: Tensors, b: Tree) -> tuple[Tree, Tree]:
        """From cotangents of the ends (or none) and of the statistics left (or none) to those of the leaves."""
        sources = (*self.trained.values(), *self.running.values())
        outputs = (*self.ends[: len(curved)], *(self.after[name] for name in b))
        if not outputs:
            return {}, {}
        found = transposed(outputs, sources, (*curved, *b.values()))
        split = len(self.trained)
        return dict(zip(self.trained, found[:split], strict=True)), dict(
            zip(self.running, found[split:], strict=True)
        )


def _differences(
    micro_batch: MicroBatch, params: Tree, buffers: Tree, *, cut: SplitPoint
) -> Callable[[Tree], Tensors]:
    """J a by the ends of two forward passes."""
    trained, _ = free(micro_batch, params, buffers)

    def push(a: Tree) -> Tensors:
        size, moved = nudged(trained, a)
        with torch.no_grad():
            up, down = (
                _ends_at(micro_batch, params | moved(sign), buffers, cut=cut)
                for sign in (1.0, -1.0)
            )
        return tuple((left - right) / (2 * size) for left, right in zip(up, down, strict=True))

    return push


def _ends_at(micro_batch: MicroBatch, params: Tree, buffers: Tree, *, cut: SplitPoint) -> Tensors:
    with micro_batch.randomness():
        outputs, _ = micro_batch.transition.task.outputs(params, buffers, micro_batch.batch)
        return cut.ends(micro_batch, outputs)


def penalty_of(micro_batch: MicroBatch, params: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Slope and exact curvature of the task's penalty, in the piece that carries it."""
    penalty = micro_batch.transition.task.penalty
    if micro_batch.index != 0 or penalty is None:
        return {}, lambda _: {}
    slope, curved = vjp(grad(penalty), params)  # type: ignore[misc]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    names = micro_batch.transition.trained

    def bend(a: Tree) -> Tree:
        (found,) = curved(zeros | a)
        return {name: found[name] for name in names}

    return slope, bend
