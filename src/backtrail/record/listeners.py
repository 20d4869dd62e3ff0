"""What else may listen to a training beside its recorder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from backtrail.run.manifest import Manifest
from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.step.update import Update
from backtrail.task.task import Batch, Task
from backtrail.tree import Tree


@runtime_checkable
class Listening(Protocol):
    """Listens while a training runs."""

    def listen(self, batch: Batch, step: int, micro_batch: int) -> Any:
        """A batch is about to be fed, presumably as this piece of this step: hear the passes on it."""
        ...

    def stepped(
        self, transition: Transition, state: State, heard: Sequence[Any], *, consumed: Tree
    ) -> bool:
        """The optimizer is about to step by a gradient; what was heard of each of the step's batches.

        Returns whether that is to be proven.
        """
        ...

    def prove(self, transition: Transition, state: State, *, tolerance: float) -> None:
        """The same step as a replay will see it, after `stepped`: refuse to go on if what was heard is not that."""
        ...

    def finish(self) -> None:
        """The training is over, or failed."""
        ...


@runtime_checkable
class Listener(Protocol):
    """Begins to listen when a recording begins."""

    def beside(
        self,
        task: Task,
        manifest: Manifest,
        trained: Mapping[str, nn.Parameter],
        *,
        keep: Callable[[str, bytes], None],
        now: Callable[[], tuple[Update, State]],
    ) -> Listening:
        """What listens; it may keep files in the recording, and ask for the update and the state as they are."""
        ...
