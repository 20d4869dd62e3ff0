r"""The gradient of a micro-batch and its Jacobian-vector product (JVP).

The tangent is a change of parameters, running statistics B and sample weights w:

.. math::
    \dot g = \nabla^2 L\, \dot\theta + \partial_B \nabla L\, \dot B
    + \sum_b c_b \dot w_b \nabla \ell_b

The loss is linear in the weights, so the last term is the gradient of the loss with the change in
their place. Every function here is the transpose of one in `vjp.py` or `gauss_newton.py`.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from backtrail.curvature.gauss_newton import Backbone, SplitPoint, add_to_some, penalty_of
from backtrail.curvature.vjp import (
    GradientGraph,
    Product,
    Tensors,
    differentiable_inputs,
    graph_vjp,
    step_along,
)
from backtrail.errors import BacktrailError
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.task.surrogate import surrogate_gradients
from backtrail.task.true_derivatives import TrueDerivatives
from backtrail.tree import Tree, each

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GradientJVP:
    """The gradient of a micro-batch at one point, and its tangent.

    Attributes:
        gradient: By the parameters that the step updates.
        buffers: After the forward pass.
        gradient_tangent: First-order change of the gradient.
        buffers_tangent: First-order change of the running statistics after the forward pass.
    """

    gradient: Tree
    buffers: Tree
    gradient_tangent: Tree
    buffers_tangent: Tree


def gradient_jvp(
    micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
) -> GradientJVP:
    """Gradient and exact JVP, by forward mode over reverse mode.

    Or, where the model cannot be called under `torch.func`, by transposing its VJP.

    Args:
        micro_batch: The loss.
        state: Parameters and buffers before the forward pass.
        tangent: Of the trained parameters and the running statistics.
        weights: Tangent of the sample weights, `[slot]`.

    Raises:
        BacktrailError: The task is wrong, whichever way it is computed.
    """
    # torch.func refuses to write to a buffer in place.
    if micro_batch.transition.task.binding.moving:
        return gradient_jvp_by_transposition(micro_batch, state, tangent, weights=weights)
    try:
        return _gradient_jvp_forward(micro_batch, state, tangent, weights=weights)
    except BacktrailError:
        # It says what is wrong, and would be raised either way.
        raise
    except (RuntimeError, NotImplementedError):
        return gradient_jvp_by_transposition(micro_batch, state, tangent, weights=weights)


def _gradient_jvp_forward(
    micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
) -> GradientJVP:
    """Gradient and exact JVP, by forward mode over reverse mode."""
    trained, running = differentiable_inputs(micro_batch, state.params, state.buffers)

    def gradient(part: Tree, statistics: Tree, w: Tensor) -> tuple[Tree, Tree]:
        value, after, _ = micro_batch.traceable_gradient(
            state.params | part, state.buffers | statistics, w
        )
        return value, after

    # The backward pass is the training's; tangents are the true ones.
    with TrueDerivatives(), surrogate_gradients():
        (value, after), (value_tangent, after_tangent) = value_and_jvp(
            gradient,
            (trained, running, torch.ones_like(weights)),
            (tangent.params, tangent.buffers, weights),
        )
    return GradientJVP(value, after, value_tangent, {name: after_tangent[name] for name in running})


def gradient_jvp_by_transposition(
    micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
) -> GradientJVP:
    r"""Gradient and exact JVP by reverse mode alone.

    The VJP :math:`a \mapsto J^\top a` is linear, and its own VJP is :math:`J`, whatever the point
    a = 0 at which it is taken.
    """
    graph = GradientGraph.record(
        micro_batch, state.params, state.buffers, weights=torch.ones_like(weights)
    )
    outputs = graph.outputs(graph.running)
    zeros = tuple(torch.zeros_like(output).requires_grad_() for output in outputs)
    tangents = (
        *(tangent.params[name] for name in graph.trained),
        *(tangent.buffers[name] for name in graph.running),
        weights,
    )
    with torch.enable_grad():
        pulled = graph_vjp(outputs, graph.inputs, zeros, create_graph=True)
    pushed = graph_vjp(pulled, zeros, tangents)
    count = len(graph.gradient)
    return GradientJVP(
        gradient=each(Tensor.detach, graph.gradient),
        buffers=each(Tensor.detach, graph.after),
        gradient_tangent=dict(zip(graph.gradient, pushed[:count], strict=True)),
        buffers_tangent=dict(zip(graph.running, pushed[count:], strict=True)),
    )


def gradient_jvp_by_differences(
    micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
) -> GradientJVP:
    """Gradient and JVP by central differences: two more gradients.

    No kernel is differentiated twice or in forward mode.
    """
    trained, running = differentiable_inputs(micro_batch, state.params, state.buffers)
    epsilon, moved = step_along(trained, tangent.params)

    def gradient_at(sign: float) -> tuple[Tree, Tree]:
        step = sign * epsilon
        statistics = {
            name: tensor + step * tangent.buffers[name] for name, tensor in running.items()
        }
        value, after, _ = micro_batch.gradient_as_trained(
            state.params | moved(sign), state.buffers | statistics, 1 + step * weights
        )
        return value, {name: after[name] for name in running}

    value, after, _ = micro_batch.gradient_as_trained(state.params, state.buffers, None)
    value_up, after_up = gradient_at(1.0)
    value_down, after_down = gradient_at(-1.0)
    value_tangent = _central_difference(value_up, value_down, epsilon)
    after_tangent = _central_difference(after_up, after_down, epsilon)
    return GradientJVP(value, after, value_tangent, after_tangent)


def split_jvp(
    micro_batch: MicroBatch,
    state: State,
    tangent: State,
    *,
    weights: Tensor,
    split: SplitPoint,
    product: Product,
) -> GradientJVP:
    r"""Gradient and JVP with the curvature K behind a split point.

    .. math:: \dot g = J^\top (K J \dot\theta + \dot s)

    Here s are the slopes of the loss at the ends, and their change comes from the weights alone.
    """
    if not micro_batch.contributes:
        # Only its running statistics matter, and their derivative is exact in any case.
        return gradient_jvp(micro_batch, state, tangent, weights=weights)
    backbone = Backbone.forward(micro_batch, state.params, state.buffers, split=split)
    ends_tangent, after_tangent = _ends_jvp(
        micro_batch, state, tangent, split=split, product=product
    )
    with torch.enable_grad(), micro_batch.recorded_randomness(state.params):
        head = split.head(micro_batch, backbone.outputs, torch.ones_like(weights))
        # With the change of the weights in their place: the change of the slopes.
        changed_head = split.head(micro_batch, backbone.outputs, weights)
    curved, _ = head.curvature(ends_tangent)
    slopes_tangent = changed_head.slopes
    if curved:
        slopes_tangent = tuple(map(torch.add, changed_head.slopes, curved))
    gradient, _ = backbone.gradient_and_jvp(head.slopes, twice=False)
    gradient_tangent, _ = backbone.gradient_and_jvp(slopes_tangent, twice=False)
    penalty_gradient, penalty_curvature = penalty_of(micro_batch, state.params)
    if curved:
        gradient_tangent = add_to_some(gradient_tangent, penalty_curvature(tangent.params))
    return GradientJVP(
        gradient=add_to_some(gradient, penalty_gradient),
        buffers=each(Tensor.detach, backbone.after),
        gradient_tangent=each(Tensor.detach, gradient_tangent),
        buffers_tangent=after_tangent,
    )


def _ends_jvp(
    micro_batch: MicroBatch, state: State, tangent: State, *, split: SplitPoint, product: Product
) -> tuple[Tensors, Tree]:
    """Tangents of the ends, and of the running statistics after the forward pass.

    Raises:
        BacktrailError: The task is wrong, whichever way it is computed.
        OutOfMemoryError: Memory ran out; differences take less.
    """
    trained, running = differentiable_inputs(micro_batch, state.params, state.buffers)

    def forward(part: Tree, statistics: Tree) -> tuple[Tensors, Tree]:
        with micro_batch.recorded_randomness(state.params):
            outputs, after = micro_batch.transition.task.outputs(
                state.params | part, state.buffers | statistics, micro_batch.batch
            )
            ends = split.ends(micro_batch, outputs)
        return ends, {name: after[name] for name in running}

    if product == "autograd":
        directions = (tangent.params, tangent.buffers)
        try:
            _, (ends_tangent, after_tangent) = value_and_jvp(
                forward, (trained, running), directions
            )
        except (BacktrailError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            note_differences(error)
        else:
            return ends_tangent, after_tangent

    epsilon, moved = step_along(trained, tangent.params)

    def forward_at(sign: float) -> tuple[Tensors, Tree]:
        step = sign * epsilon
        statistics = {
            name: tensor + step * tangent.buffers[name] for name, tensor in running.items()
        }
        with micro_batch.transition.task.without_graph():
            return forward(moved(sign), statistics)

    ends_up, after_up = forward_at(1.0)
    ends_down, after_down = forward_at(-1.0)
    pairs = zip(ends_up, ends_down, strict=True)
    ends_difference = tuple((up - down) / (2 * epsilon) for up, down in pairs)
    return ends_difference, _central_difference(after_up, after_down, epsilon)


def note_differences(error: Exception) -> None:
    """Log that forward mode cannot follow the model, so that central differences are taken."""
    first_line = str(error).partition("\n")[0]
    log.warning("forward mode cannot follow this model; taking differences: %s", first_line)


def _central_difference(up: Tree, down: Tree, epsilon: Tensor) -> Tree:
    return {name: (tensor - down[name]) / (2 * epsilon) for name, tensor in up.items()}


def value_and_jvp(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Value and Jacobian-vector product of a function, whose inputs and outputs may be nested.

    >>> import torch
    >>> value_and_jvp(lambda x: x**2, (torch.tensor(3.0),), (torch.tensor(1.0),))
    (tensor(9.), tensor(6.))
    """
    with warnings.catch_warnings():
        # The first call in a process loads torch's forward-mode rules, in a way that torch itself
        # deprecates (as a FutureWarning since 2.14).
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        value, tangent, *_ = jvp(function, primals, tangents)
    return value, tangent
