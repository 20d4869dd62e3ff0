r"""The gradient of every sample's loss at a step, made small by projection, beside the gradient of the step itself.

One forward pass and one backward pass serve both, with training's own kernels. Every operation that
uses a parameter is watched, and the small gradients follow from its inputs and from the cotangents
of its outputs (`uses.py`). That watching is a guess about layouts, so it proves itself: with random
weights :math:`\omega` of the samples,

.. math:: \sum_b \omega_b\, P(\nabla\ell_b) = P(\nabla \sum_b \omega_b \ell_b)

must hold for every parameter (`explained.py`). It is asked again whenever the parameters are used
in another way, and at steps 1, 2, 4, 8, ... Parameters for which it does not hold (in a recurrent
layer, say) are differentiated sample by sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

from backtrail.accel.context import accelerated
from backtrail.persample.check import grads, slopes_of, unverified
from backtrail.persample.rules import (
    Asked,
    Cotangents,
    Loss,
    Parts,
    PerSampleRule,
    Reductions,
    Rows,
    parts_of,
    row_of,
)
from backtrail.persample.trace import OpTracer
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree


def watched(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> "Watched":
    """Take the gradient of a micro-batch, and keep what the rows of its samples follow from.

    Args:
        micro_batch: the micro-batch; its modules are put into the recorded modes.
        params: where the gradients are taken.
        buffers: before the forward pass.
    """
    task = micro_batch.transition.task
    with torch.enable_grad(), micro_batch.transition.replaying(twice=False):
        normed = any(
            isinstance(module, _BatchNorm) and module.training for module in task.binding.modules()
        )
        whole = (
            micro_batch.slopes(params, buffers, None)
            if normed or not micro_batch.contributes
            else None
        )
        if whole is not None and not micro_batch.contributes:
            return Watched(micro_batch, whole[2], whole[0], whole[1])
        seen, after = _seen(micro_batch, params, buffers)
        losses, leaves = seen.losses, list(seen.leaves.values())
        found = grads(seen.weighted, [*seen.edges, *leaves])
        seen.cotangents = dict(zip(seen.edges, found, strict=False))
        if seen.froze_statistics:
            gradient, after, losses = whole or micro_batch.slopes(params, buffers, None)
        else:
            gradient = _with_penalty(
                micro_batch, params, dict(zip(seen.leaves, found[len(seen.edges) :], strict=True))
            )
    left = {name: tensor.detach() for name, tensor in after.items()}
    return Watched(micro_batch, losses.detach(), gradient, left, seen)


def watched_alone(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> "Watched":
    """The same for rows under losses that are read off the outputs: nothing is taken of the task's own.

    Args:
        micro_batch: as above; it must be counted.
        params: as above.
        buffers: as above.
    """
    with torch.enable_grad(), micro_batch.transition.replaying(twice=False):
        seen, _ = _seen(micro_batch, params, buffers)
    return Watched(micro_batch, seen.losses.detach(), {}, {}, seen)


def _seen(micro_batch: MicroBatch, params: Tree, buffers: Tree) -> tuple["_Seen", Tree]:
    """A forward pass, and the buffers that it leaves."""
    task = micro_batch.transition.task
    leaves = {
        name: params[name].detach().requires_grad_() for name in micro_batch.transition.updated
    }
    watching = OpTracer(leaves, len(micro_batch.share), micro_batch.batch)
    with micro_batch.randomness():
        with watching:
            outputs, after = task.outputs(params | leaves, buffers, micro_batch.batch)
        losses = task.losses_of(outputs, micro_batch.batch)
    return _Seen(
        leaves, watching.uses, outputs, losses, micro_batch.share, watching.froze_statistics
    ), after


def _with_penalty(
    micro_batch: MicroBatch, params: Tree, gradient: Mapping[str, Tensor | None]
) -> Tree:
    whole = {
        name: torch.zeros_like(params[name]) if part is None else part
        for name, part in gradient.items()
    }
    penalty = micro_batch.transition.task.penalty
    if penalty is None or micro_batch.index != 0:
        return whole
    leaves = {name: params[name].detach().requires_grad_() for name in whole}
    found = slopes_of(penalty(params | leaves), leaves)
    return {name: tensor + found[name] for name, tensor in whole.items()}


@final
@dataclass(slots=True)
class _Seen:
    """A forward pass that was watched.

    Attributes:
        leaves: the parameters that the graph starts from.
        uses: of them.
        outputs: of the model.
        losses: of the task, `[slot]`, with their graph.
        share: of the losses in the step's.
        froze_statistics: whether the pass took a batch's statistics for constants.
        cotangents: of the uses, of the losses weighted with their shares, once they are known.
    """

    leaves: Tree
    uses: list[PerSampleRule]
    outputs: Any
    losses: Tensor
    share: Tensor
    froze_statistics: bool
    cotangents: Cotangents | None = None

    @property
    def edges(self) -> list[GradientEdge]:
        """Where the uses are in the graph."""
        return list(dict.fromkeys(use.edge for use in self.uses))

    @property
    def weighted(self) -> Tensor:
        """The piece's loss."""
        return (self.losses * self.share.to(self.losses)).sum()

    def own(self) -> Cotangents:
        """The cotangents of the task's own losses."""
        if self.cotangents is None:
            self.cotangents = self.of(self.weighted)
        return self.cotangents

    def of(self, loss: Tensor) -> Cotangents:
        """Those of a number."""
        return dict(zip(self.edges, grads(loss, self.edges), strict=True))


@final
@dataclass(frozen=True, slots=True)
class Watched:
    """A micro-batch's gradient, and the rows of its samples for whatever reductions are asked (of the gradient, say).

    Attributes:
        micro_batch: the micro-batch.
        losses: the task's losses `[slot]`, as `MicroBatch.loss` gives them.
        gradient: the piece's part of the step's gradient, like that of `MicroBatch.gradient`.
        buffers: as the forward pass left them.
        seen: the graph; it is as large as that of a training step, and lives as long as this.
    """

    micro_batch: MicroBatch
    losses: Float[Tensor, " slot"]
    gradient: Tree
    buffers: Tree
    seen: _Seen | None = None

    @property
    def froze_statistics(self) -> bool:
        """Whether the rows take a batch's statistics for constants, where the gradient does not."""
        return self.seen is not None and self.seen.froze_statistics

    def rows(self, asked: Sequence[Asked]) -> Rows:
        """Projected gradients of the samples' losses, not divided by the batch.

        With BatchNorm in train mode every loss depends on every sample; the rows then take the
        batch's statistics for constants (the step's gradient does not). Elsewhere they are exact. A
        slot whose share of the step's loss is zero has a row of zeros under the task's loss. A
        piece that the update did not consume has no rows.

        Args:
            asked: losses, read off the model's outputs (the task's own costs no backward pass), and
                sets of reductions, all of the same parameters in the same order; parameters that
                the step does not move have zeros.
        """
        if self.seen is None:
            like = next(iter(self.gradient.values()))
            return tuple(
                like.new_zeros(0, sum(one.rank for one in reductions.values()))
                for _, reductions in asked
            )
        # Under autocast the factors are as coarse as training's; their products need not be.
        with (
            torch.enable_grad(),
            torch.autocast(self.losses.device.type, enabled=False),
            accelerated(),
        ):
            outputs, batch = self.seen.outputs, self.micro_batch.batch
            read = {
                loss: self.seen.losses if loss is None else loss(outputs, batch)
                for loss, _ in asked
            }
            cotangents = {loss: self._cotangents(losses) for loss, losses in read.items()}
            parts = parts_of(self.seen.uses, cotangents, asked, share=self._share)
            return self._joined(asked, parts, read)

    @property
    def _share(self) -> Tensor:
        return self.micro_batch.share.to(self.losses)

    def _cotangents(self, losses: Tensor) -> Cotangents:
        assert self.seen is not None
        return self.seen.own() if losses is self.seen.losses else self.seen.of(losses.sum())

    def _joined(
        self, asked: Sequence[Asked], parts: Sequence[Parts], read: Mapping[Loss | None, Tensor]
    ) -> Rows:
        """All parameters behind each other; the unexplained ones one sample at a time."""
        assert self.seen is not None
        alone = {name: self.seen.leaves[name] for name in self._unexplained(asked[0][1])}
        slopes = {
            loss: [slopes_of(one, alone) for one in losses] if alone else []
            for loss, losses in read.items()
        }
        rows = []
        for (loss, reductions), found in zip(asked, parts, strict=True):
            whole = {name: torch.stack([each[name] for each in slopes[loss]]) for name in alone}
            rows.append(row_of(found | _small(whole, reductions), reductions, like=self.losses))
        return tuple(rows)

    def _unexplained(self, reductions: Reductions) -> frozenset[str]:
        assert self.seen is not None
        seen = self.seen

        def parts() -> Parts:
            return parts_of(seen.uses, {None: seen.own()}, [(None, reductions)], share=self._share)[
                0
            ]

        kind = len(self.losses), tuple(reductions), tuple(use.kind for use in seen.uses)
        ends = seen.outputs, seen.losses
        return unverified(
            self.micro_batch, ends, seen.leaves, kind=kind, reductions=reductions, parts=parts
        )


def _small(whole: Tree, reductions: Reductions) -> Parts:
    return {name: reductions[name].reduce(tensor) for name, tensor in whole.items()}
