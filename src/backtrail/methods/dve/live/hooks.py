"""What was heard of a loop's own passes on one batch: uses of parameters, and what they make of cotangents."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from backtrail.accel.onednn import fast_products
from backtrail.errors import NotCaptured
from backtrail.methods.dve.step_features import Arrays, StepFeatures
from backtrail.persample.check import grads
from backtrail.persample.rules import Asked, Gathered, Loss, Reductions, row_of
from backtrail.persample.trace import OpTracer
from backtrail.step.step import MicroBatch
from backtrail.task.task import Batch, size_of
from backtrail.tree import Tree

PROOF, LOSS = "proof", "loss"  # beside the arrays


@final
class BatchHooks:
    """Listens to the calls of a model on one batch, and to the backward pass that follows.

    Cotangents become rows as soon as their reductions are known: when they come by, where the
    update is one number per coordinate, or else when `settle` is told.

    Args:
        what: is wanted of a step.
        batch: that is fed.
        leaves: the live parameters.
        drawn: the loss with drawn labels, where it is wanted.
        proves: whether a pass that used its parameters in these ways is to prove itself.

    Attributes:
        fresh: bytes of the cotangents that came by; whoever settles may set it back.
        proving: whether the pass is to prove itself; its rows then have the task's own gradients,
            too.
    """

    def __init__(
        self,
        what: StepFeatures,
        batch: Batch,
        leaves: Tree,
        *,
        drawn: Loss | None,
        proves: Callable[[Hashable], bool],
    ) -> None:
        self.batch, self.fresh, self.proving = batch, 0, False
        self._what, self._proves = what, proves
        self._watching = OpTracer(leaves, size_of(batch), batch, aside=True)
        self._given: list[Any] = []
        self._losses: Tensor | None = None
        self._drawn = drawn
        self._gathered = Gathered([])
        self._by_edge: list[list[int]] = []  # numbers of uses
        self._kept: dict[int, dict[Loss | None, Tensor]] = {}  # condensed cotangents, by use

    def enter(self) -> None:
        """The model is about to be called."""
        self._watching.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, output: Any) -> None:
        """The model was called; once `predict` would have all it asks for, its outputs are those of the batch."""
        self._watching.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self._losses is not None or output is None:
            return  # there are outputs already, or the call failed
        self._given.append(output)
        outputs = self._predicted()
        if outputs is not None:
            self._begin(outputs)

    def settle(self, scaled: Reductions) -> None:
        """Make rows for these parameters of what was kept, now that it is known how the update moves them."""
        asked = self._asked(scaled)
        with self._reducing():
            for number, use in enumerate(self._watching.uses):
                if use.name in scaled and number in self._kept:
                    self._add(number, self._kept.pop(number), asked)

    def rows(self, micro_batch: MicroBatch) -> Arrays:
        """The arrays of a micro-batch's rows (the proof's, too), and its losses `[slot]`, once all is settled.

        Raises:
            NotCaptured: the model's call was not seen.
        """
        if self._losses is None:
            raise NotCaptured(
                micro_batch.transition.step.index, "the model's call on its batch was not seen"
            )
        parts = zip(
            self._asked({}), self._gathered.parts(micro_batch.share.to(self._losses)), strict=True
        )
        small = self._what.projection.sides
        return {name: row_of(part, small, like=self._losses) for name, part in parts} | {
            LOSS: self._losses
        }

    def forget(self) -> None:
        """Let go of the passes: what they kept is as large as a training step."""
        self._watching.uses.clear()
        self._kept.clear()
        self._given, self._by_edge = [], []

    def _asked(self, scaled: Reductions) -> dict[str, Asked]:
        what = self._what
        asked = what.asked(self._drawn, None if what.plain else scaled)
        return asked | {PROOF: (None, what.projection.sides)} if self.proving else asked

    def _predicted(self) -> Any:
        """What the task's `predict` makes of what the model returned; None while it asks for more calls."""
        task = self._what.task
        devices = [task.device] if task.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                stand_in = cast("nn.Module", _Answering(task.model, iter(self._given)))
                return task.predict(stand_in, self.batch)
            except _Unanswered:
                return None

    def _begin(self, outputs: Any) -> None:
        """The uses are known: listen to the backward pass, after those of our own."""
        task, uses = self._what.task, self._watching.uses
        self.proving = self._proves(tuple(use.kind for use in uses))
        with torch.no_grad():
            self._losses = task.losses_of(outputs, self.batch)
        by_edge: dict[Any, list[int]] = {}
        for number, use in enumerate(uses):
            by_edge.setdefault(use.edge, []).append(number)
        self._by_edge = list(by_edge.values())
        self._gathered = Gathered([loss for loss, _ in self._asked({}).values()])
        if self._drawn is not None:
            with torch.autocast(task.device.type, enabled=False), fast_products():
                found = grads(self._drawn(outputs, self.batch).sum(), list(by_edge))
            for place in range(len(found)):
                self._arrived(self._drawn, place, found[place])
                found[place] = None  # some of it has become smaller
        for place, edge in enumerate(by_edge):
            edge.node.register_prehook(_receiver(weakref.ref(self), place, edge.output_nr))

    def _arrived(self, loss: Loss | None, place: int, cotangent: Tensor | None) -> None:
        if cotangent is None or not self._by_edge:
            return
        if loss is None:
            self.fresh += cotangent.nbytes
        for number in self._by_edge[place]:
            condensed = self._watching.uses[number].condensed(cotangent.detach())
            if self._what.plain:
                with self._reducing():
                    self._add(number, {loss: condensed}, self._asked({}))
            else:
                kept = self._kept.setdefault(number, {})
                kept[loss] = kept[loss] + condensed if loss in kept else condensed

    @contextmanager
    def _reducing(self) -> Iterator[None]:
        # Under autocast the factors are as coarse as training's; their products need not be.
        with torch.autocast(self._what.task.device.type, enabled=False), fast_products():
            yield

    def _add(
        self, number: int, condensed: dict[Loss | None, Tensor], asked: dict[str, Asked]
    ) -> None:
        use = self._watching.uses[number]
        self._gathered.add(
            use, condensed, [reductions[use.name] for _, reductions in asked.values()]
        )


def _receiver(
    heard: "weakref.ref[BatchHooks]", place: int, output: int
) -> Callable[[Sequence[Tensor | None]], None]:
    """A hook. It must not hold what holds the graph: no garbage collector looks into that."""

    def receive(cotangents: Sequence[Tensor | None]) -> None:
        listening = heard()
        if listening is not None:
            listening._arrived(None, place, cotangents[output])

    return receive


class _Unanswered(Exception):  # noqa: N818 - no error of anyone's
    """The model was asked more often than it was called."""


class _Answering:
    """Stands for the model: it returns what that returned when the loop called it."""

    def __init__(self, model: nn.Module, given: Iterator[Any]) -> None:
        self._model, self._given = model, given

    def __call__(self, *args: object, **kwargs: object) -> Any:
        del args, kwargs
        for output in self._given:
            return output
        raise _Unanswered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For those who ask whether it is an instance of the model's class."""
        return type(self._model)
