"""Which steps keep a checkpoint, and which checkpoints are dropped again."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from backtrail.errors import BadPolicy


class CheckpointPolicy(abc.ABC):
    """Says before which steps a run keeps its state. State 0 and the final state are kept whatever the policy."""

    @abc.abstractmethod
    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the state before `step` is kept; `opens_epoch` is the epoch that the step opens, if it opens one."""

    @abc.abstractmethod
    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """States to forget once the state before `step` is kept."""


@final
@dataclass(frozen=True, slots=True)
class Every(CheckpointPolicy):
    """Keeps one state per `period` steps.

    >>> [step for step in range(9) if Every(4).keeps(step, opens_epoch=None)]
    [0, 4, 8]
    """

    period: int

    def __post_init__(self) -> None:
        """Refuse a period that never comes round."""
        _require(self, self.period >= 1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the step's number is a multiple of the period."""
        del opens_epoch
        return step % self.period == 0

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """Nothing is dropped."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Epochs(CheckpointPolicy):
    """Keeps the state at the start of every `period`-th epoch.

    >>> Epochs().keeps(30, opens_epoch=3), Epochs().keeps(31, opens_epoch=None)
    (True, False)
    """

    period: int = 1

    def __post_init__(self) -> None:
        """Refuse a period that never comes round."""
        _require(self, self.period >= 1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the step opens an epoch whose number is a multiple of the period."""
        del step
        return opens_epoch is not None and opens_epoch % self.period == 0

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """Nothing is dropped."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Geometric(CheckpointPolicy):
    """Keeps states at the rounded powers of `ratio`: dense early, where a model changes fastest.

    >>> [step for step in range(40) if Geometric(2.0).keeps(step, opens_epoch=None)]
    [0, 1, 2, 4, 8, 16, 32]
    """

    ratio: float = 1.2

    def __post_init__(self) -> None:
        """Refuse powers that do not grow."""
        _require(self, self.ratio > 1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether some power of the ratio rounds to the step's number."""
        del opens_epoch
        power = 1.0
        while round(power) < step:
            power *= self.ratio
        return step == 0 or round(power) == step

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """Nothing is dropped."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Only(CheckpointPolicy):
    """Keeps the states before the given steps.

    >>> [step for step in range(9) if Only((2, 5)).keeps(step, opens_epoch=None)]
    [2, 5]
    """

    steps: Sequence[int]

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Whether the step was named."""
        del opens_epoch
        return step in self.steps

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """Nothing is dropped."""
        del kept, step
        return []


@final
@dataclass(frozen=True, slots=True)
class Last(CheckpointPolicy):
    """Keeps the states of the last `window` steps and state 0: a sliding window of constant size on disk.

    >>> Last(2).drops([0, 5, 6, 7], 7)
    [5]
    """

    window: int

    def __post_init__(self) -> None:
        """Refuse an empty window."""
        _require(self, self.window >= 1)

    def keeps(self, step: int, *, opens_epoch: int | None) -> bool:
        """Every state is kept for a while."""
        del step, opens_epoch
        return True

    def drops(self, kept: Sequence[int], step: int) -> list[int]:
        """What has left the window."""
        return [state for state in kept if 0 < state <= step - self.window]


def _require(policy: CheckpointPolicy, possible: bool) -> None:  # noqa: FBT001
    if not possible:
        raise BadPolicy(str(policy))
