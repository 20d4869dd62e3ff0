"""Steps of plain training between those of what is measured, so that a slow minute slows both."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Beats:
    """Takes some plain steps at every call.

    Args:
        step: takes one.
        clock: processor time for one thread, wall-clock time for several.
        each: steps at a call.
    """

    def __init__(
        self,
        step: Callable[[], object],
        *,
        clock: Callable[[], float] = time.process_time,
        each: int = 1,
    ) -> None:
        self._step, self._clock, self._each, self._taken, self._count = step, clock, each, 0.0, 0
        self._begun = clock()

    def __call__(self) -> None:
        """Take some."""
        begun = self._clock()
        for _ in range(self._each):
            self._step()
        self._taken += self._clock() - begun
        self._count += self._each

    @property
    def unit(self) -> float:
        """Seconds of one."""
        return self._taken / self._count

    def ratio(self, steps: int) -> float:
        """What so many steps took, of all the time since the beginning, in plain steps each."""
        return (self._clock() - self._begun - self._taken) / steps / self.unit


@contextmanager
def after_each(owner: Any, name: str, beats: Beats) -> Iterator[None]:
    """While the block runs, plain steps follow every call of a function."""
    real = getattr(owner, name)

    def followed(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        beats()
        return found

    setattr(owner, name, followed)
    try:
        yield
    finally:
        setattr(owner, name, real)
