"""What an adjoint sweep goes back along: the states and steps of one training."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.task.task import Task


@runtime_checkable
class Trajectory(Protocol):
    """A recorded training (`backtrail.Run`), or that training run again with other weights."""

    @property
    def task(self) -> Task:
        """Model, data and loss."""
        ...

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        ...

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the states on disk, ascending."""
        ...

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that the optimizer holds."""
        ...

    def state(self, number: int, *, replay: bool = ...) -> State:
        """One state; with `replay` also one that is not on disk."""
        ...

    def transition(self, index: int) -> Transition:
        """One step as a function from state to state."""
        ...

    def walk(self, first: int, last: int) -> Iterator[tuple[int, State]]:
        """Yield the states first ... last with their numbers, in order."""
        ...
