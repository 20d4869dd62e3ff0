"""What was heard of a loop's own passes on one batch: uses of parameters, and cotangents as they came by."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from whence.errors import NotCaptured
from whence.replay.explained import grads
from whence.replay.rows import Cotangents, Loss, Reductions, Rows, parts_of, row_of, unshared
from whence.replay.transition import Piece
from whence.replay.uses import Use
from whence.replay.watching import Watching
from whence.task import Batch, Task, size_of
from whence.tree import Tree


@final
class Heard:
    """Listens to the calls of a model on one batch, and to the backward pass that follows.

    Args:
        task: of the training.
        batch: that is fed.
        leaves: the live parameters.
        drawn: the loss with drawn labels, where it is wanted.
    """

    def __init__(self, task: Task, batch: Batch, leaves: Tree, *, drawn: Loss | None) -> None:
        self.batch, self.drawn = batch, drawn
        self._task = task
        self._watching = Watching(leaves, size_of(batch), batch, aside=True)
        self._given: list[Any] = []
        self._losses: Tensor | None = None
        self._edges: list[GradientEdge] = []
        self._received: dict[int, Tensor] = {}  # by place of the edge
        self._of_drawn: Cotangents = {}

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

    def passed(self, piece: Piece) -> "Passed":
        """The passes, as those of a micro-batch of a step.

        Raises:
            NotCaptured: the model's call was not seen.
        """
        if self._losses is None:
            raise NotCaptured(piece.transition.step.index, "the model's call on its batch was not seen")
        own = {edge: self._received.get(place) for place, edge in enumerate(self._edges)}
        cotangents: dict[Loss | None, Cotangents] = {self.drawn: self._of_drawn, None: own}
        return Passed(self._watching.uses, cotangents, self._losses, piece.share.to(self._losses))

    def forget(self) -> None:
        """Let go of the passes: what they kept is as large as a training step."""
        self._watching.uses.clear()
        self._received.clear()
        self._given, self._edges, self._of_drawn = [], [], {}

    def _predicted(self) -> Any:
        """What the task's `predict` makes of what the model returned; None while it asks for more calls."""
        devices = [self._task.device] if self._task.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                stand_in = cast("nn.Module", _Answering(self._task.model, iter(self._given)))
                return self._task.predict(stand_in, self.batch)
            except _Unanswered:
                return None

    def _begin(self, outputs: Any) -> None:
        with torch.no_grad():
            self._losses = self._task.losses_of(outputs, self.batch)
        self._edges = list(dict.fromkeys(use.edge for use in self._watching.uses))
        if self.drawn is not None:
            with torch.autocast(self._task.device.type, enabled=False):
                found = grads(self.drawn(outputs, self.batch).sum(), self._edges)
            self._of_drawn = dict(zip(self._edges, found, strict=True))
        for place, edge in enumerate(self._edges):
            edge.node.register_prehook(_receiver(self._received, place, edge.output_nr))


def _receiver(received: dict[int, Tensor], place: int, output: int) -> Callable[[Sequence[Tensor | None]], None]:
    """A hook. It must not hold what holds the graph: no garbage collector looks into that."""

    def receive(cotangents: Sequence[Tensor | None]) -> None:
        found = cotangents[output]
        if found is not None:
            received[place] = received[place] + found.detach() if place in received else found.detach()

    return receive


@final
@dataclass(frozen=True, slots=True)
class Passed:
    """One forward and backward pass of the loop's own.

    Attributes:
        uses: of parameters.
        cotangents: of the uses, by loss (None: the task's, weighted with the shares).
        losses: of the task, `[slot]`.
        share: of every slot, in the step's loss.
    """

    uses: Sequence[Use]
    cotangents: Mapping[Loss | None, Cotangents]
    losses: Float[Tensor, " slot"]
    share: Float[Tensor, " slot"]

    def rows(self, sides: Sequence[Reductions], losses: Sequence[Loss | None] = (None,)) -> Rows:
        """Projected gradients of the samples' losses, by loss and by set of reductions."""
        with torch.enable_grad(), torch.autocast(self.losses.device.type, enabled=False):
            parts = parts_of(self.uses, [self.cotangents[loss] for loss in losses], sides)
        pairs = zip(losses, parts, strict=True)
        single = [unshared(one, self.share) if loss is None else one for loss, one in pairs]
        return tuple(
            tuple(row_of(part, one, like=self.losses) for part, one in zip(of_loss, sides, strict=True))
            for of_loss in single
        )


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
