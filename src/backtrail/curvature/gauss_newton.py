r"""Gauss-Newton products: only the end of the loss is differentiated twice.

The network is split at tensors e, its *ends*: the model's outputs, or already the samples' losses.
With J the derivative of e by the parameters and K a curvature of the loss as a function of e, the
product with a direction a is :math:`J^\top K J a`.
"""

import abc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.func import grad, vjp

from backtrail.accel.context import accelerated
from backtrail.curvature.vjp import (
    GradientVJP,
    Product,
    Tensors,
    as_leaves,
    differentiable_inputs,
    gradient_vjp,
    graph_vjp,
    step_along,
)
from backtrail.errors import NoOutputs
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, add, tree_flatten, tree_leaves, tree_unflatten

log = logging.getLogger(__name__)

# From a tangent J a of the ends to K J a (empty where K is zero), and the scores [slot].
EndCurvature = Callable[[Tensors], tuple[Tensors, Tensor]]
JVP = Callable[[Tree], Tensors]  # from a direction a to J a


@dataclass(frozen=True, slots=True)
class LossHead:
    """A micro-batch's loss as a function of the ends.

    Attributes:
        slopes: s, its derivative by the ends.
        curvature: The product with K, and the scores.
        losses: Of the samples, `[slot]`.
    """

    slopes: Tensors
    curvature: EndCurvature
    losses: Tensor


class SplitPoint(abc.ABC):
    """Decides at which tensors a network is split, and which curvature the loss has behind them."""

    @abc.abstractmethod
    def ends(self, micro_batch: MicroBatch, outputs: Any) -> Tensors:
        """Select the ends from what the model returned."""

    @abc.abstractmethod
    def head(self, micro_batch: MicroBatch, outputs: Any, weights: Tensor) -> LossHead:
        """Evaluate the loss as a function of the ends, with these sample weights `[slot]`."""


@final
class AtOutputs(SplitPoint):
    """Split at the model's outputs: K is the second derivative of the loss by them."""

    def ends(self, micro_batch: MicroBatch, outputs: Any) -> Tensors:
        """All floating-point tensors among the outputs.

        Raises:
            NoOutputs: There are none.
        """
        del micro_batch
        found = tuple(leaf for leaf in tree_leaves(outputs) if _is_floating(leaf))
        if not found:
            raise NoOutputs(type(outputs).__name__)
        return found

    def head(self, micro_batch: MicroBatch, outputs: Any, weights: Tensor) -> LossHead:
        """Slopes by reverse mode; K and scores by one VJP of the slopes by ends and weights."""
        leaves, structure = tree_flatten(outputs)
        found = self.ends(micro_batch, outputs)
        ends = tuple(end.detach().requires_grad_() for end in found)
        w = weights.detach().requires_grad_()
        remaining = iter(ends)
        filled = [next(remaining) if _is_floating(leaf) else leaf for leaf in leaves]
        # Plain autograd, since torch.func refuses some losses that it can follow.
        total, losses = micro_batch.value(tree_unflatten(filled, structure), w)
        slopes = graph_vjp((total,), ends, (torch.ones_like(total),), create_graph=True)

        def curvature(tangent: Tensors) -> tuple[Tensors, Tensor]:
            *curved, scores = graph_vjp(slopes, (*ends, w), tangent)
            return tuple(curved), scores

        return LossHead(tuple(slope.detach() for slope in slopes), curvature, losses.detach())


@final
@dataclass(frozen=True, slots=True)
class AtLosses(SplitPoint):
    """Split at the samples' losses: K = diag(c w), for the empirical Fisher matrix, or K = 0.

    Attributes:
        curved: Whether K is not zero.
    """

    curved: bool

    def ends(self, micro_batch: MicroBatch, outputs: Any) -> Tensors:
        """The losses."""
        return (micro_batch.transition.task.losses_of(outputs, micro_batch.batch),)

    def head(self, micro_batch: MicroBatch, outputs: Any, weights: Tensor) -> LossHead:
        """The loss is a weighted sum, with slopes c w."""
        (losses,) = self.ends(micro_batch, outputs)
        c = micro_batch.share.to(losses)

        def curvature(tangent: Tensors) -> tuple[Tensors, Tensor]:
            scores = c * tangent[0]
            return (weights * scores,) if self.curved else (), scores

        return LossHead((c * weights,), curvature, losses.detach())


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def split_vjp(
    micro_batch: MicroBatch,
    params: Tree,
    buffers: Tree,
    *,
    weights: Tensor,
    split: SplitPoint,
    product: Product,
) -> GradientVJP:
    """Gradient of a micro-batch, and its VJP with the curvature behind a split point.

    A penalty keeps its exact curvature where there is any at all.
    """
    if not micro_batch.contributes:
        # Only its running statistics matter, and their derivative is exact in any case.
        return gradient_vjp(micro_batch, params, buffers, weights=weights)
    with accelerated(second_order="forward"):
        backbone = Backbone.forward(micro_batch, params, buffers, split=split)
    with torch.enable_grad(), micro_batch.recorded_randomness(params):
        head = split.head(micro_batch, backbone.outputs, weights)
    gradient, jvp = backbone.gradient_and_jvp(head.slopes, twice=product == "autograd")
    by_differences = _jvp_by_differences(micro_batch, params, buffers, split=split)
    if product == "difference":
        jvp = by_differences
    elif isinstance(split, AtLosses):
        jvp = _or_else(jvp, backbone.loss_jvp)
    else:
        jvp = _or_else(jvp, by_differences)
    penalty_gradient, penalty_curvature = penalty_of(micro_batch, params)

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        curved, scores = head.curvature(jvp(a))
        by_params, by_running = backbone.vjp(curved, b)
        if curved:
            by_params = add(by_params, penalty_curvature(a))
        return by_params, by_running, scores

    return GradientVJP(
        gradient=add_to_some(gradient, penalty_gradient),
        buffers={name: tensor.detach() for name, tensor in backbone.after.items()},
        losses=head.losses,
        vjp=pull,
    )


def add_to_some(gradient: Tree, more: Tree) -> Tree:
    """Add a tree to the entries that a gradient has; all others are dropped."""
    return {
        name: tensor + more[name] if name in more else tensor for name, tensor in gradient.items()
    }


@dataclass(frozen=True, slots=True)
class Backbone:
    """The graph of one forward pass up to the ends.

    Attributes:
        updated: Parameters that the step updates, leaves of the graph.
        trained: Parameters that the optimizer holds, with those.
        running: Running statistics before the pass, leaves as well.
        outputs: What the model returned.
        ends: The tensors at which the network is split.
        after: Buffers after the pass.
    """

    updated: Tree
    trained: Tree
    running: Tree
    outputs: Any
    ends: Tensors
    after: Tree

    @staticmethod
    def forward(
        micro_batch: MicroBatch, params: Tree, buffers: Tree, *, split: SplitPoint
    ) -> "Backbone":
        """Run the model once."""
        trained, running = differentiable_inputs(micro_batch, params, buffers)
        trained = as_leaves(trained)
        running = as_leaves(running)
        with torch.enable_grad(), micro_batch.recorded_randomness(params):
            outputs, after = micro_batch.transition.task.outputs(
                params | trained, buffers | running, micro_batch.batch
            )
            ends = split.ends(micro_batch, outputs)
        updated = {name: trained[name] for name in micro_batch.transition.updated}
        return Backbone(updated, trained, running, outputs, ends, after)

    def gradient_and_jvp(self, slopes: Tensors, *, twice: bool) -> tuple[Tree, JVP]:
        """Gradient for slopes s of the ends, and the JVP from a direction a to the tangent J a.

        The gradient J' s is linear in s, so J a is its VJP by s with cotangent a: reverse mode
        twice, and no forward mode is needed. `twice` says whether the JVP will be used.
        """
        s = tuple(slope.detach().requires_grad_(twice) for slope in slopes)
        # Only a gradient that is differentiated again: a tangent sweep moves the state by this one,
        # which must be that of the training to the last bit.
        recording = accelerated(second_order="gradient") if twice else nullcontext()
        with torch.enable_grad(), recording:
            found = graph_vjp(self.ends, tuple(self.updated.values()), s, create_graph=twice)
        gradient = dict(zip(self.updated, found, strict=True))

        def jvp(a: Tree) -> Tensors:
            cotangents = tuple(a[name] for name in gradient)
            return graph_vjp(tuple(gradient.values()), s, cotangents)

        return {name: tensor.detach() for name, tensor in gradient.items()}, jvp

    def loss_jvp(self, a: Tree) -> Tensors:
        """J a where the ends are the losses, by the gradient of each: one pass per sample.

        No operation is differentiated twice, not even by its cotangent alone.
        """
        (losses,) = self.ends
        names = list(self.updated)
        products: list[Tensor] = []
        for loss in losses:
            found = graph_vjp((loss,), tuple(self.updated.values()), (torch.ones_like(loss),))
            terms = [(a[name] * part).sum() for name, part in zip(names, found, strict=True)]
            products.append(torch.stack(terms).sum())
        return (torch.stack(products),)

    def vjp(self, end_cotangents: Tensors, b: Tree) -> tuple[Tree, Tree]:
        """VJP of the pass by parameters and running statistics.

        Args:
            end_cotangents: Of the ends; empty for zero.
            b: Of the running statistics after the pass; empty for zero.
        """
        outputs = (*self.ends[: len(end_cotangents)], *(self.after[name] for name in b))
        if not outputs:
            return {}, {}
        inputs = (*self.trained.values(), *self.running.values())
        found = graph_vjp(outputs, inputs, (*end_cotangents, *b.values()))
        count = len(self.trained)
        by_params = dict(zip(self.trained, found[:count], strict=True))
        by_running = dict(zip(self.running, found[count:], strict=True))
        return by_params, by_running


def _or_else(first: JVP, second: JVP) -> JVP:
    """Use the second way where the model has an operation that the first cannot follow."""
    cannot = False

    def jvp(a: Tree) -> Tensors:
        nonlocal cannot
        if not cannot:
            try:
                return first(a)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # An operation without a second derivative, like nn.EmbeddingBag's.
                log.info("a derivative of the gradient is taken otherwise: %s", error)
                cannot = True
        return second(a)

    return jvp


def _jvp_by_differences(
    micro_batch: MicroBatch, params: Tree, buffers: Tree, *, split: SplitPoint
) -> JVP:
    """J a by central differences of the ends, with two forward passes."""
    trained, _ = differentiable_inputs(micro_batch, params, buffers)

    def ends_at(part: Tree) -> Tensors:
        with micro_batch.transition.task.without_graph(), micro_batch.recorded_randomness(params):
            outputs, _ = micro_batch.transition.task.outputs(
                params | part, buffers, micro_batch.batch
            )
            return split.ends(micro_batch, outputs)

    def jvp(a: Tree) -> Tensors:
        epsilon, moved = step_along(trained, a)
        ends_up = ends_at(moved(1.0))
        ends_down = ends_at(moved(-1.0))
        pairs = zip(ends_up, ends_down, strict=True)
        return tuple((up - down) / (2 * epsilon) for up, down in pairs)

    return jvp


def penalty_of(micro_batch: MicroBatch, params: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Gradient and exact curvature product of the task's penalty.

    It belongs to the first micro-batch of a step; elsewhere both are empty.
    """
    transition = micro_batch.transition
    penalty = transition.task.penalty
    if micro_batch.index != 0 or penalty is None:
        return {}, lambda _: {}
    gradient, pull = vjp(grad(penalty), params)  # type: ignore[misc]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}

    def curvature(a: Tree) -> Tree:
        (found,) = pull(zeros | a)
        return {name: found[name] for name in transition.trained}

    return gradient, curvature
