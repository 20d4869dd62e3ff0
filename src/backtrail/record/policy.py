"""Checkpoint policies: which states of a training are stored, and which are deleted again."""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from backtrail import arguments
from backtrail.errors import BadPolicy, BadSetting


class CheckpointPolicy(abc.ABC):
    """Decides before which steps a run stores its state.

    State 0 and the final state are stored whatever the policy says. To write a policy of your own,
    derive from this class.
    """

    @abc.abstractmethod
    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether to store the state before a step.

        Args:
            step: number of the step, from 0.
            opens_epoch: the epoch that begins with this step, from 0; None if none does.
        """

    @abc.abstractmethod
    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """States to delete after the state before `step` was stored.

        Args:
            kept: numbers of all stored states, ascending; the last is `step`.
            step: number of the state that was just stored.
        """


@final
@dataclass(frozen=True, slots=True)
class Every(CheckpointPolicy):
    """Stores the state before every `period`-th step.

    >>> [step for step in range(9) if Every(4).keeps(step, opens_epoch=None)]
    [0, 4, 8]

    Args:
        period: number of steps between two stored states, at least 1.

    Raises:
        BadPolicy: the period is less than 1.
    """

    period: int

    def __post_init__(self) -> None:
        """Check the period."""
        _keep_number(self, "period", arguments.as_whole(self.period), least=1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the number of the step is a multiple of the period."""
        del opens_epoch
        return step % self.period == 0

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """No state is deleted."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Epochs(CheckpointPolicy):
    """Stores the state at the start of every `period`-th epoch.

    >>> Epochs().keeps(30, opens_epoch=3), Epochs().keeps(31, opens_epoch=None)
    (True, False)

    Args:
        period: number of epochs between two stored states, at least 1.

    Raises:
        BadPolicy: the period is less than 1.
    """

    period: int = 1

    def __post_init__(self) -> None:
        """Check the period."""
        _keep_number(self, "period", arguments.as_whole(self.period), least=1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the step begins an epoch whose number is a multiple of the period."""
        del step
        return opens_epoch is not None and opens_epoch % self.period == 0

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """No state is deleted."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Geometric(CheckpointPolicy):
    """Stores states at the rounded powers of `ratio`: dense early, where a model changes fastest.

    >>> [step for step in range(40) if Geometric(2.0).keeps(step, opens_epoch=None)]
    [0, 1, 2, 4, 8, 16, 32]

    Args:
        ratio: factor between two stored steps, more than 1.

    Raises:
        BadPolicy: the ratio is 1 or less.
    """

    ratio: float = 1.2

    def __post_init__(self) -> None:
        """Check the ratio.

        Raises:
            BadPolicy: it is not a finite number above 1.
        """
        ratio = arguments.as_real(self.ratio)
        if ratio is None or not 1 < ratio < math.inf:
            raise BadPolicy(str(self))
        object.__setattr__(self, "ratio", ratio)  # the dataclass is frozen

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether some power of the ratio rounds to the number of the step."""
        del opens_epoch
        if step == 0:
            return True
        # The nearest power is that with the nearest exponent, or one beside it.
        exponent = round(math.log(step) / math.log(self.ratio))
        return any(round(self.ratio**near) == step for near in range(exponent - 1, exponent + 2))

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """No state is deleted."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Only(CheckpointPolicy):
    """Stores the states before the given steps.

    >>> [step for step in range(9) if Only((2, 5)).keeps(step, opens_epoch=None)]
    [2, 5]

    Args:
        steps: numbers of the steps.

    Raises:
        BadPolicy: one of them is not a whole number of 0 or more.
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        """Check the steps.

        Raises:
            BadPolicy: one of them is not a whole number of 0 or more.
        """
        try:
            steps = arguments.whole_numbers("steps", self.steps, empty=True)
        except BadSetting:
            raise BadPolicy(str(self)) from None
        object.__setattr__(self, "steps", tuple(steps))  # the dataclass is frozen

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the step is one of the given ones."""
        del opens_epoch
        return step in self.steps

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """No state is deleted."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Last(CheckpointPolicy):
    """Stores the states of the last `window` steps, and state 0: constant size on disk.

    >>> Last(2).drops([0, 5, 6, 7], 7)
    [5]

    Args:
        window: number of states, at least 1.

    Raises:
        BadPolicy: the window is less than 1.
    """

    window: int

    def __post_init__(self) -> None:
        """Check the window."""
        _keep_number(self, "window", arguments.as_whole(self.window), least=1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Every state is stored, and deleted once it leaves the window."""
        del step, opens_epoch
        return True

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """Stored states that have left the window, except state 0."""
        return [state for state in kept if 0 < state <= step - self.window]


def _keep_number(policy: CheckpointPolicy, name: str, number: int | None, *, least: int) -> None:
    """Keep a setting as a plain number.

    Raises:
        BadPolicy: it is no whole number, or too small.
    """
    if number is None or number < least:
        raise BadPolicy(str(policy))
    object.__setattr__(policy, name, number)  # the dataclass is frozen
