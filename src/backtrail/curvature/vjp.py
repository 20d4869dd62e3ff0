r"""The gradient of a micro-batch and its vector-Jacobian product (VJP), exact or by differences.

The gradient is a function of parameters, buffers and sample weights. With a the cotangent of the
gradient and b that of the buffers after the forward pass, its VJP holds everything that an adjoint
sweep needs: the curvature product with what came through the running statistics, their own
cotangents, and the samples' scores

.. math::
    (\nabla^2 L\, a + B_\theta^\top b,\quad \partial_B,\quad
    c_b \langle a, \nabla \ell_b \rangle)

No per-sample gradient is formed, and losses that couple the samples of a batch (BatchNorm,
contrastive losses) are exact.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.func import vmap

from backtrail.accel.allocator import trim
from backtrail.accel.context import accelerated
from backtrail.step.step import MicroBatch
from backtrail.task.surrogate import surrogate_gradients
from backtrail.task.true_derivatives import TrueDerivatives
from backtrail.tree import Tree, add, each

Tensors = tuple[Tensor, ...]
Product = Literal["autograd", "difference"]
# (cotangent of the gradient, of the running statistics) -> (cotangent of the parameters, of the
# running statistics before the forward pass, scores [slot])
VJP = Callable[[Tree, Tree], tuple[Tree, Tree, Tensor]]
# (parameters, running statistics) -> (loss, (buffers after the forward pass, losses [slot]))
Loss = Callable[[Tree, Tree], tuple[Tensor, tuple[Tree, Tensor]]]
# From a sign to the parameters after a step with that sign.
Moved = Callable[[float], Tree]


@dataclass(frozen=True, slots=True)
class GradientVJP:
    """The gradient of a micro-batch at one point, and its vector-Jacobian product.

    Attributes:
        gradient: By the parameters that the step updates.
        buffers: After the forward pass.
        losses: Of the samples, `[slot]`.
        vjp: For one pair of cotangents.
        batched_vjp: The same for a first axis of cotangents, where there is a better way than
            `vmap` of `vjp`.
    """

    gradient: Tree
    buffers: Tree
    losses: Tensor
    vjp: VJP
    batched_vjp: VJP | None = None


def gradient_vjp(
    micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
) -> GradientVJP:
    """Gradient and exact VJP, by reverse mode over reverse mode."""
    graph = GradientGraph.record(micro_batch, params, buffers, weights=weights)

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        cotangents = (*(a[name] for name in graph.gradient), *b.values())
        # The loss is linear in w, so the cotangent of w is the scores.
        *found, scores = graph_vjp(graph.outputs(b), graph.inputs, cotangents)
        by_params = dict(zip(graph.trained, found[: len(graph.trained)], strict=True))
        by_running = dict(zip(graph.running, found[len(graph.trained) :], strict=True))
        return by_params, by_running, scores

    value = each(Tensor.detach, graph.gradient)
    after = each(Tensor.detach, graph.after)
    return GradientVJP(value, after, graph.losses.detach(), pull)


@final
@dataclass(frozen=True, slots=True)
class GradientGraph:
    """The gradient of a micro-batch with its graph, in which it can be differentiated once more.

    Attributes:
        trained: Leaves: the parameters that the optimizer may change.
        running: Leaves: the running statistics before the forward pass.
        weights: Leaf: the sample weights, `[slot]`.
        gradient: By the parameters that the step updates.
        after: The buffers after the forward pass.
        losses: Of the samples, `[slot]`.
    """

    trained: Tree
    running: Tree
    weights: Tensor
    gradient: Tree
    after: Tree
    losses: Tensor

    @staticmethod
    def record(
        micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> "GradientGraph":
        """Run the forward and the backward pass, and keep the graph of both."""
        trained, running = differentiable_inputs(micro_batch, params, buffers)
        trained = as_leaves(trained)
        running = as_leaves(running)
        w = weights.detach().requires_grad_()
        updated = {name: trained[name] for name in micro_batch.transition.updated}
        with torch.enable_grad(), accelerated(second_order="forward"):
            moves = micro_batch.transition.task.binding.moving
            with TrueDerivatives() as mode, mode.saving() if moves else nullcontext():
                total, (after, losses) = micro_batch.loss(params | trained, buffers | running, w)
            micro_batch.transition.task.binding.note_calls(mode.cuts, mode.left)
            if mode.once:
                raise NotImplementedError(
                    f"the derivative of the backward pass of {', '.join(mode.once)} is not "
                    "implemented (once_differentiable)"
                )
            # The gradient is the training's; its derivative is the true one.
            with surrogate_gradients():
                gradient = graph_vjp(
                    (total,), tuple(updated.values()), (torch.ones_like(total),), create_graph=True
                )
        by_name = dict(zip(updated, gradient, strict=True))
        return GradientGraph(trained, running, w, by_name, after, losses)

    @property
    def inputs(self) -> Tensors:
        """Trained parameters, running statistics and weights."""
        return (*self.trained.values(), *self.running.values(), self.weights)

    def outputs(self, running: Iterable[str]) -> Tensors:
        """The gradient, and the named running statistics after the forward pass."""
        return (*self.gradient.values(), *(self.after[name] for name in running))


def gradient_vjp_by_differences(
    micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
) -> GradientVJP:
    r"""Gradient and VJP, by two more gradients per query.

    .. math::
        \nabla^2 L\, a \approx
        (\nabla L(\theta + \epsilon a) - \nabla L(\theta - \epsilon a)) / 2 \epsilon

    The scores come from the losses of the same two passes. No graph outlives a pass, and no kernel
    is differentiated twice, so it fits into training's own memory and runs on fused attention.
    """
    if micro_batch.transition.task.total is not None:
        # Its scores are no differences of losses: there are no losses of single rows.
        return gradient_vjp(micro_batch, params, buffers, weights=weights)
    trained, running = differentiable_inputs(micro_batch, params, buffers)
    share = micro_batch.share

    def loss(part: Tree, statistics: Tree) -> tuple[Tensor, tuple[Tree, Tensor]]:
        return micro_batch.loss(params | part, buffers | statistics, weights)

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        epsilon, moved = step_along(trained, a)
        exact = _statistics_pull(micro_batch, params, buffers)(b) if running else ({}, {})
        return _central_differences(loss, epsilon, moved, running, share=share, exact=exact)

    def batched(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        epsilons = vmap(lambda one: step_along(trained, one)[0])(a)

        def moved(sign: float) -> Tree:
            found: Tree = vmap(lambda one: step_along(trained, one)[1](sign))(a)
            return found

        statistics = each(lambda tensor: tensor.expand(len(epsilons), *tensor.shape), running)
        # Recorded before `vmap`, which not every model can be called under.
        exact = vmap(_statistics_pull(micro_batch, params, buffers))(b) if running else ({}, {})
        losses = vmap(loss, randomness="same")
        return _central_differences(losses, epsilons, moved, statistics, share=share, exact=exact)

    gradient, _, (after, losses) = _gradients(loss, trained, running)
    updated = {name: gradient[name] for name in micro_batch.transition.updated}
    return GradientVJP(updated, after, losses, pull, batched)


def _central_differences(
    loss: Loss,
    epsilon: Tensor,
    moved: Moved,
    running: Tree,
    *,
    share: Tensor,
    exact: tuple[Tree, Tree],
) -> tuple[Tree, Tree, Tensor]:
    """Central differences of the gradients and of the losses, plus what is known exactly.

    Args:
        loss: Of one query, or of many that share nothing.
        epsilon: Step size, `[]` or `[query]`.
        moved: The parameters after a step.
        running: The running statistics, of each query.
        share: Of the samples in the loss, `[slot]`.
        exact: Cotangents of parameters and running statistics that are added.
    """
    by_params_up, by_running_up, (_, losses_up) = _gradients(loss, moved(1.0), running)
    by_params_down, by_running_down, (_, losses_down) = _gradients(loss, moved(-1.0), running)

    def slope(up: Tensor, down: Tensor) -> Tensor:
        width = (2 * epsilon).reshape(epsilon.shape + (1,) * (up.dim() - epsilon.dim()))
        return up.sub_(down).div_(width)  # in the memory of the first: it is not needed any more

    by_params = {name: slope(up, by_params_down[name]) for name, up in by_params_up.items()}
    by_running = {name: slope(up, by_running_down[name]) for name, up in by_running_up.items()}
    scores = share.to(losses_up) * slope(losses_up, losses_down)
    return add(by_params, exact[0]), add(by_running, exact[1]), scores


def _gradients(loss: Loss, part: Tree, running: Tree) -> tuple[Tree, Tree, tuple[Tree, Tensor]]:
    """Gradients of a loss, or of many that share nothing, by parameters and running statistics.

    As training computes them: `torch.func.grad` would keep the whole graph until the end, for a
    derivative of its own.
    """
    trained_leaves = as_leaves(part)
    running_leaves = as_leaves(running)
    with torch.enable_grad():
        values, (after, losses) = loss(trained_leaves, running_leaves)
    total = values.sum()
    inputs = (*trained_leaves.values(), *running_leaves.values())
    after = each(Tensor.detach, after)
    losses = losses.detach()
    if total.requires_grad:
        found = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    else:
        # The update did not consume this micro-batch's gradient.
        found = tuple(torch.zeros_like(leaf) for leaf in inputs)
    # Otherwise the next pass takes new memory, beside the holes that this one leaves.
    trim()
    by_params = dict(zip(part, found[: len(part)], strict=True))
    by_running = dict(zip(running, found[len(part) :], strict=True))
    return by_params, by_running, (after, losses)


def _statistics_pull(
    micro_batch: MicroBatch, params: Tree, buffers: Tree
) -> Callable[[Tree], tuple[Tree, Tree]]:
    """VJP of the forward pass from the running statistics that it leaves."""
    trained, running = differentiable_inputs(micro_batch, params, buffers)
    trained = as_leaves(trained)
    running = as_leaves(running)
    with torch.enable_grad():
        _, (after, _) = micro_batch.loss(params | trained, buffers | running, None)

    def pull(b: Tree) -> tuple[Tree, Tree]:
        outputs = tuple(after[name] for name in b)
        inputs = (*trained.values(), *running.values())
        found = graph_vjp(outputs, inputs, tuple(b.values()))
        by_params = dict(zip(trained, found[: len(trained)], strict=True))
        by_running = dict(zip(running, found[len(trained) :], strict=True))
        return by_params, by_running

    return pull


def differentiable_inputs(
    micro_batch: MicroBatch, params: Tree, buffers: Tree
) -> tuple[Tree, Tree]:
    """What a gradient is differentiated by: trained parameters and running statistics."""
    transition = micro_batch.transition
    trained = {name: params[name] for name in transition.trained}
    running = {name: buffers[name] for name in transition.task.running if name in buffers}
    return trained, running


def as_leaves(tree: Tree) -> Tree:
    """The same tensors as leaves of a new graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tree.items()}


def graph_vjp(
    outputs: Tensors, inputs: Tensors, cotangents: Tensors, *, create_graph: bool = False
) -> Tensors:
    """VJP of a recorded graph, which is kept; zero for inputs that no output depends on."""
    # autograd refuses outputs that depend on no leaf, such as a frozen end of the network.
    used = [place for place, output in enumerate(outputs) if output.requires_grad]
    return torch.autograd.grad(
        [outputs[place] for place in used],
        inputs,
        [cotangents[place] for place in used],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def step_along(params: Tree, direction: Tree) -> tuple[Tensor, Moved]:
    r"""Step size :math:`\epsilon` for central differences along a direction, and a function.

    The function returns the parameters after a step with the given sign.

    The step is a fixed share of the parameters' own norm, whatever the direction's norm: the cube
    root of the machine epsilon balances rounding, which falls with the size, and curvature, which
    grows with its square.
    """
    dtype = next(iter(params.values())).dtype
    share = torch.finfo(dtype).eps ** (1 / 3)
    params_norm = _norm(params)
    direction_norm = _norm(direction)
    epsilon = share * params_norm / torch.where(direction_norm > 0, direction_norm, 1.0)

    def moved(sign: float) -> Tree:
        changed = {
            name: params[name] + sign * epsilon * tensor for name, tensor in direction.items()
        }
        return params | changed

    return epsilon, moved


def _norm(tree: Tree) -> Tensor:
    # A tensor, unlike backtrail.tree.norm: this runs under vmap.
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tree.values()])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total
