"""What is recorded of a loop's own passes over one batch.

That is which operations used parameters in the forward pass, and the cotangents of their outputs in
the backward pass.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from backtrail.accel.context import accelerated
from backtrail.errors import NotCaptured
from backtrail.methods.dve.step_features import Arrays, StepFeatures
from backtrail.persample.check import maybe_gradients
from backtrail.persample.rules import Loss, Reductions, Request, RowSums, concatenate_rows
from backtrail.persample.trace import OpTracer
from backtrail.step.step import MicroBatch
from backtrail.task.preserved_objects import preserved_objects
from backtrail.task.task import Batch, size_of
from backtrail.tree import Tree

# Names of the rows that a pass is checked with, and of its losses, beside the arrays.
PROOF = "proof"
LOSS = "loss"


@final
class BatchHooks:
    """Records a model's calls on one batch, and the backward pass that follows.

    Cotangents become rows as soon as their reductions are known: at once, where the update is one
    number per coordinate, or else when `settle` is called.

    Args:
        what: What is gathered of a step.
        batch: The batch.
        leaves: The live parameters.
        sampled_loss: The loss with sampled labels, where the curvature consists of those.
        proves: Whether a pass that used its parameters in these ways is to be checked.

    Attributes:
        fresh: Bytes of the cotangents that arrived; whoever settles them may set it back.
        proving: Whether the pass is to be checked; its rows then include the task's own gradients.
    """

    def __init__(
        self,
        what: StepFeatures,
        batch: Batch,
        leaves: Tree,
        *,
        sampled_loss: Loss | None,
        proves: Callable[[Hashable], bool],
    ) -> None:
        self.batch = batch
        self.fresh = 0
        self.proving = False
        self._what = what
        self._proves = proves
        self._tracer = OpTracer(leaves, size_of(batch), batch, observing=True)
        # What the model returned, call by call.
        self._outputs: list[Any] = []
        self._losses: Tensor | None = None
        self._sampled_loss = sampled_loss
        self._gathered = RowSums([])
        # Numbers of the uses whose cotangents arrive at each edge of the graph.
        self._by_edge: list[list[int]] = []
        # Condensed cotangents that wait for their reductions, by number of the use.
        self._kept: dict[int, dict[Loss | None, Tensor]] = {}

    def enter(self) -> None:
        """The model is about to be called."""
        self._tracer.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, output: Any) -> None:
        """The model returned; its outputs are known once `predict` needs no more calls."""
        self._tracer.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        has_outputs = self._losses is not None
        call_failed = output is None
        if has_outputs or call_failed:
            return
        self._outputs.append(output)
        predicted = self._predicted()
        if predicted is not None:
            self._begin(predicted)

    def settle(self, scaled: Reductions) -> None:
        """Make rows of the kept cotangents of some parameters.

        Args:
            scaled: Their reductions, now that it is known how the update moves them.
        """
        requested = self._requested(scaled)
        with self._reducing():
            for number, use in enumerate(self._tracer.uses):
                if use.name in scaled and number in self._kept:
                    self._add(number, self._kept.pop(number), requested)

    def rows(self, micro_batch: MicroBatch) -> Arrays:
        """The rows of a micro-batch (those of the check, too) and its losses, once all is settled.

        Raises:
            NotCaptured: The model's call was not seen.
        """
        if self._losses is None:
            step = micro_batch.transition.step.index
            raise NotCaptured(step, "the model's call on its batch was not seen")
        sides = self._what.projection.sides
        parts = self._gathered.parts(micro_batch.share.to(self._losses))
        arrays = {}
        for name, part in zip(self._requested({}), parts, strict=True):
            arrays[name] = concatenate_rows(part, sides, like=self._losses)
        arrays[LOSS] = self._losses
        return arrays

    def forget(self) -> None:
        """Release the passes: what they keep is as large as a training step."""
        self._tracer.uses.clear()
        self._kept.clear()
        self._outputs = []
        self._by_edge = []

    def _requested(self, scaled: Reductions) -> dict[str, Request]:
        what = self._what
        requested = what.requested(self._sampled_loss, None if what.plain else scaled)
        if self.proving:
            requested[PROOF] = (None, what.projection.sides)
        return requested

    def _predicted(self) -> Any:
        """What `predict` makes of the model's outputs; None while it asks for more calls."""
        task = self._what.task
        devices = [task.device] if task.device.type == "cuda" else []
        stand_in = cast("nn.Module", _RecordedModel(task.model, iter(self._outputs)))
        with torch.random.fork_rng(devices), preserved_objects(task.predict):
            try:
                return task.predict(stand_in, self.batch)
            except _NoMoreOutputs:
                return None

    def _begin(self, outputs: Any) -> None:
        """All uses are known: register for the backward pass, after our own ones."""
        task = self._what.task
        uses = self._tracer.uses
        self.proving = self._proves(tuple(use.kind for use in uses))
        # The loop calls its loss as well, whose own memory (a counter, say) must not change.
        with torch.no_grad(), preserved_objects(task.loss):
            self._losses = task.losses_of(outputs, self.batch)
        by_edge: dict[Any, list[int]] = {}
        for number, use in enumerate(uses):
            by_edge.setdefault(use.edge, []).append(number)
        self._by_edge = list(by_edge.values())
        self._gathered = RowSums([loss for loss, _ in self._requested({}).values()])
        if self._sampled_loss is not None:
            with torch.autocast(task.device.type, enabled=False), accelerated():
                total = self._sampled_loss(outputs, self.batch).sum()
                cotangents = maybe_gradients(total, list(by_edge))
            for place in range(len(cotangents)):
                self._arrived(self._sampled_loss, place, cotangents[place])
                # It was condensed, so that its memory can be freed.
                cotangents[place] = None
        for place, edge in enumerate(by_edge):
            edge.node.register_prehook(_receiver(weakref.ref(self), place, edge.output_nr))

    def _arrived(self, loss: Loss | None, place: int, cotangent: Tensor | None) -> None:
        """A cotangent arrived at an edge, in a backward pass of this loss (None: the task's)."""
        if cotangent is None or not self._by_edge:
            return
        if loss is None:
            self.fresh += cotangent.nbytes
        for number in self._by_edge[place]:
            condensed = self._tracer.uses[number].condense(cotangent.detach())
            if self._what.plain:
                with self._reducing():
                    self._add(number, {loss: condensed}, self._requested({}))
            else:
                kept = self._kept.setdefault(number, {})
                kept[loss] = kept[loss] + condensed if loss in kept else condensed

    @contextmanager
    def _reducing(self) -> Iterator[None]:
        # Under autocast the factors are as coarse as training's; their products need not be.
        with torch.autocast(self._what.task.device.type, enabled=False), accelerated():
            yield

    def _add(
        self, number: int, condensed: dict[Loss | None, Tensor], requested: dict[str, Request]
    ) -> None:
        use = self._tracer.uses[number]
        sides = [reductions[use.name] for _, reductions in requested.values()]
        self._gathered.add(use, condensed, sides)


def _receiver(
    hooks: "weakref.ref[BatchHooks]", place: int, output: int
) -> Callable[[Sequence[Tensor | None]], None]:
    """A hook for a node of the graph.

    It holds a weak reference: a cycle through the graph would never be collected, since the garbage
    collector does not look into the graph.
    """

    def receive(cotangents: Sequence[Tensor | None]) -> None:
        alive = hooks()
        if alive is not None:
            alive._arrived(None, place, cotangents[output])

    return receive


class _NoMoreOutputs(Exception):  # noqa: N818 - it is control flow, not an error
    """The model was called more often than outputs were recorded."""


class _RecordedModel:
    """Model stand-in that returns recorded outputs, call by call."""

    def __init__(self, model: nn.Module, outputs: Iterator[Any]) -> None:
        self._model = model
        self._outputs = outputs

    def __call__(self, *args: object, **kwargs: object) -> Any:
        del args, kwargs
        for output in self._outputs:
            return output
        raise _NoMoreOutputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The model's class, for code that asks `isinstance`."""
        return type(self._model)
