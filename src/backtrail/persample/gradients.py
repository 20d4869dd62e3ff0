r"""Sketched per-sample gradients of a micro-batch, with the gradient of the micro-batch itself.

One forward pass and one backward pass serve both, with training's own kernels. Every operation that
uses a parameter is traced, and the sketched gradients follow from its inputs and from the
cotangents of its outputs (`rules.py`). The trace is a guess about layouts, so it is verified: with
random weights :math:`\omega` of the samples,

.. math:: \sum_b \omega_b\, P(\nabla\ell_b) = P(\nabla \sum_b \omega_b \ell_b)

must hold for every parameter (`check.py`). That is checked whenever the parameters are used in a
new way, and at steps 1, 2, 4, 8, ... Parameters for which it does not hold (in a recurrent layer,
say) are differentiated sample by sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backtrail.accel.context import accelerated
from backtrail.persample.check import gradients_of, maybe_gradients, unverified
from backtrail.persample.rules import (
    Cotangents,
    Loss,
    Parts,
    PerSampleRule,
    Reductions,
    Request,
    Rows,
    concatenate_rows,
    sum_over_uses,
)
from backtrail.persample.trace import OpTracer
from backtrail.step.step import MicroBatch
from backtrail.task.batchnorm import is_batchnorm
from backtrail.tree import Tree


def trace_gradient(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> "TracedPass":
    """Compute the gradient of a micro-batch, and keep what its samples' gradients follow from.

    Args:
        micro_batch: The micro-batch; its modules are put into the recorded modes.
        params: Where the gradients are taken.
        buffers: Before the forward pass.
    """
    with torch.enable_grad(), micro_batch.transition.replaying(double_backward=False):
        if not micro_batch.contributes:
            gradient, after, losses = micro_batch.gradient_as_trained(params, buffers, None)
            return TracedPass(micro_batch, losses, gradient, after)
        exact = None
        if _has_batch_statistics(micro_batch):
            # The trace takes the statistics as constants, so the gradient needs a pass of its own.
            exact = micro_batch.gradient_as_trained(params, buffers, None)
        graph, after = _forward(micro_batch, params, buffers)
        losses = graph.losses
        # One backward pass for the cotangents of the uses and for the gradient.
        leaves = list(graph.leaves.values())
        edges = graph.edges
        found = maybe_gradients(graph.weighted_loss, [*edges, *leaves])
        graph.own_cotangents = dict(zip(edges, found[: len(edges)], strict=True))
        if graph.froze_statistics:
            gradient, after, losses = exact or micro_batch.gradient_as_trained(
                params, buffers, None
            )
        else:
            by_leaf = dict(zip(graph.leaves, found[len(edges) :], strict=True))
            gradient = _with_penalty(micro_batch, params, by_leaf)
    after = {name: tensor.detach() for name, tensor in after.items()}
    return TracedPass(micro_batch, losses.detach(), gradient, after, graph)


def trace_forward(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> "TracedPass":
    """Trace a forward pass alone, for gradients of losses that are read off the outputs.

    The task's own loss is not differentiated, so `gradient` and `buffers` of the result are empty.

    Args:
        micro_batch: As above; the step must have consumed its gradient.
        params: As above.
        buffers: As above.
    """
    with torch.enable_grad(), micro_batch.transition.replaying(double_backward=False):
        graph, _ = _forward(micro_batch, params, buffers)
    return TracedPass(micro_batch, graph.losses.detach(), {}, {}, graph)


def _has_batch_statistics(micro_batch: MicroBatch) -> bool:
    """Whether a BatchNorm layer is in train mode."""
    modules = micro_batch.transition.task.binding.modules()
    return any(is_batchnorm(module) and module.training for module in modules)


def _forward(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> tuple["_Graph", Tree]:
    """Trace a forward pass; return its graph and the buffers after it."""
    task = micro_batch.transition.task
    leaves = {
        name: params[name].detach().requires_grad_() for name in micro_batch.transition.updated
    }
    tracer = OpTracer(leaves, len(micro_batch.share), micro_batch.batch)
    with micro_batch.recorded_randomness(params):
        with tracer:
            outputs, after = task.outputs(params | leaves, buffers, micro_batch.batch)
        losses = task.losses_of(outputs, micro_batch.batch)
    graph = _Graph(
        leaves=leaves,
        uses=tracer.uses,
        outputs=outputs,
        losses=losses,
        share=micro_batch.share,
        froze_statistics=tracer.froze_statistics,
    )
    return graph, after


def _with_penalty(
    micro_batch: MicroBatch, params: Tree, gradient: Mapping[str, Tensor | None]
) -> Tree:
    """The gradient with zeros where there is none, and that of the task's penalty."""
    whole = {}
    for name, part in gradient.items():
        whole[name] = torch.zeros_like(params[name]) if part is None else part
    penalty = micro_batch.transition.task.penalty
    if penalty is None or micro_batch.index != 0:
        return whole
    leaves = {name: params[name].detach().requires_grad_() for name in whole}
    of_penalty = gradients_of(penalty(params | leaves), leaves)
    return {name: tensor + of_penalty[name] for name, tensor in whole.items()}


@final
@dataclass(slots=True)
class _Graph:
    """The graph of a traced forward pass.

    Attributes:
        leaves: The parameters that the graph starts from.
        uses: Of them.
        outputs: Of the model.
        losses: Of the task, `[slot]`.
        share: Of the slots in the step's loss.
        froze_statistics: Whether batch statistics were taken as constants.
        own_cotangents: Of the uses, under the task's losses weighted with their shares; None
            before they are known.
    """

    leaves: Tree
    uses: list[PerSampleRule]
    outputs: Any
    losses: Tensor
    share: Tensor
    froze_statistics: bool
    own_cotangents: Cotangents | None = None

    @property
    def edges(self) -> list[GradientEdge]:
        """Where in the graph the uses are, each once."""
        return list(dict.fromkeys(use.edge for use in self.uses))

    @property
    def weighted_loss(self) -> Tensor:
        """The micro-batch's part of the step's loss."""
        return (self.losses * self.share.to(self.losses)).sum()

    def task_cotangents(self) -> Cotangents:
        """Cotangents of the uses under the task's own losses."""
        if self.own_cotangents is None:
            self.own_cotangents = self.cotangents(self.weighted_loss)
        return self.own_cotangents

    def cotangents(self, loss: Tensor) -> Cotangents:
        """Cotangents of the uses under a number."""
        edges = self.edges
        return dict(zip(edges, maybe_gradients(loss, edges), strict=True))


@final
@dataclass(frozen=True, slots=True)
class TracedPass:
    """A micro-batch's gradient, and the rows of its samples for any requests.

    The requests may depend on the gradient.

    Attributes:
        micro_batch: The micro-batch.
        losses: The task's losses `[slot]`, as `MicroBatch.loss` returns them.
        gradient: The micro-batch's part of the step's gradient, as by `MicroBatch.gradient`.
        buffers: After the forward pass.
        graph: As large as that of a training step, and alive as long as this object; None where
            the step did not consume the gradient.
    """

    micro_batch: MicroBatch
    losses: Float[Tensor, " slot"]
    gradient: Tree
    buffers: Tree
    graph: _Graph | None = None

    @property
    def froze_statistics(self) -> bool:
        """Whether the rows take batch statistics as constants, which the gradient does not."""
        return self.graph is not None and self.graph.froze_statistics

    def rows(self, requests: Sequence[Request]) -> Rows:
        """Sketched gradients of the samples' losses, not divided by the size of the batch.

        With BatchNorm in train mode every loss depends on every sample; the rows then take the
        batch statistics as constants (the step's gradient does not). Elsewhere they are exact. A
        slot whose share of the step's loss is zero has a row of zeros under the task's loss. A
        micro-batch whose gradient the step did not consume has no rows.

        Args:
            requests: Losses, read off the model's outputs (the task's own costs no backward pass),
                and reductions, all of the same parameters in the same order; parameters that the
                step does not update have zeros.
        """
        graph = self.graph
        if graph is None:
            return self._no_rows(requests)
        losses: dict[Loss | None, Tensor] = {}
        cotangents: dict[Loss | None, Cotangents] = {}
        # Under autocast the factors are as coarse as training's; their products need not be.
        full_precision = torch.autocast(self.losses.device.type, enabled=False)
        with torch.enable_grad(), full_precision, accelerated():
            for loss, _ in requests:
                if loss is None:
                    losses[loss] = graph.losses
                    cotangents[loss] = graph.task_cotangents()
                elif loss not in losses:
                    losses[loss] = loss(graph.outputs, self.micro_batch.batch)
                    cotangents[loss] = graph.cotangents(losses[loss].sum())
            parts = sum_over_uses(graph.uses, cotangents, requests, share=self._share)
            return self._complete(graph, requests, parts, losses)

    @property
    def _share(self) -> Tensor:
        return self.micro_batch.share.to(self.losses)

    def _no_rows(self, requests: Sequence[Request]) -> Rows:
        like = next(iter(self.gradient.values()))
        rows = []
        for _, reductions in requests:
            rank = sum(sketch.rank for sketch in reductions.values())
            rows.append(like.new_zeros(0, rank))
        return tuple(rows)

    def _complete(
        self,
        graph: _Graph,
        requests: Sequence[Request],
        parts: Sequence[Parts],
        losses: Mapping[Loss | None, Tensor],
    ) -> Rows:
        """All parameters one after the other; the unverified ones sample by sample."""
        names = self._unverified(graph, requests[0][1])
        leaves = {name: graph.leaves[name] for name in names}
        rows = []
        gradients = {loss: _by_sample(of_loss, leaves) for loss, of_loss in losses.items()}
        for (loss, reductions), part in zip(requests, parts, strict=True):
            sketched = {
                name: reductions[name].reduce(tensor) for name, tensor in gradients[loss].items()
            }
            rows.append(concatenate_rows(part | sketched, reductions, like=self.losses))
        return tuple(rows)

    def _unverified(self, graph: _Graph, reductions: Reductions) -> frozenset[str]:
        def parts() -> Parts:
            cotangents: dict[Loss | None, Cotangents] = {None: graph.task_cotangents()}
            request: Request = (None, reductions)
            return sum_over_uses(graph.uses, cotangents, [request], share=self._share)[0]

        kind = len(self.losses), tuple(reductions), tuple(use.kind for use in graph.uses)
        return unverified(
            self.micro_batch,
            graph.outputs,
            graph.losses,
            graph.leaves,
            kind=kind,
            reductions=reductions,
            parts=parts,
        )


def _by_sample(losses: Tensor, leaves: Tree) -> Tree:
    """Whole gradients `[slot, *shape]`, one backward pass per sample."""
    if not leaves:
        return {}
    gradients = [gradients_of(loss, leaves) for loss in losses]
    return {name: torch.stack([gradient[name] for gradient in gradients]) for name in leaves}
