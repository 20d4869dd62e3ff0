"""Protocols for live capture: objects that see a training's own passes while it is recorded."""

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
class BatchListener(Protocol):
    """Sees every batch and every step of a training that is running."""

    def on_batch(self, batch: Batch, step: int, micro_batch: int) -> Any:
        """A batch is about to be fed to the model: capture the passes on it.

        Args:
            batch: its content.
            step: the step that will probably consume its gradient.
            micro_batch: its position in that step.

        Returns:
            An object that holds the captured passes and has the attribute `batch`, what the model
            is fed. `before_step` gets it back if a step consumes the batch.
        """
        ...

    def before_step(
        self, transition: Transition, state: State, captured: Sequence[Any], *, consumed: Tree
    ) -> bool:
        """The optimizer is about to step.

        Args:
            transition: the step.
            state: the state before it.
            captured: what `on_batch` returned for each of the step's micro-batches.
            consumed: the gradient that the optimizer is given.

        Returns:
            Whether `check` is to be called for this step.
        """
        ...

    def check(self, transition: Transition, state: State, *, tolerance: float) -> None:
        """Compare what was captured of a step with a replay of it; raise if they differ.

        Called after `before_step`, before the update is made.
        """
        ...

    def close(self) -> None:
        """The training is over, or failed: remove all hooks and write what is pending."""
        ...


@runtime_checkable
class CaptureMethod(Protocol):
    """A method that can capture what it needs of a training while it runs."""

    def start_capture(
        self,
        task: Task,
        manifest: Manifest,
        trained: Mapping[str, nn.Parameter],
        *,
        write_file: Callable[[str, bytes], None],
        upcoming_update: Callable[[], tuple[Update, State]],
    ) -> BatchListener:
        """Start to listen to a training that is about to be recorded.

        Args:
            task: the task, with the live model.
            manifest: the manifest of the recording.
            trained: the live parameters that the optimizer holds.
            write_file: adds a file to the recording, by name and content.
            upcoming_update: returns the update as the optimizer would make it now, and the state
                before it (without buffers).
        """
        ...
