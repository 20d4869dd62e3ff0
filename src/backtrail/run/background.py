"""Work that is done in order beside a training, which goes on meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final


@final
class Aside:
    """One thread for what the disk and checksums take; both leave the interpreter to others.

    >>> aside, done = Aside(), []
    >>> aside(lambda: done.append(1))
    >>> aside.wait()
    >>> done
    [1]
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backtrail")
        self._going: list[Future[object]] = []

    def __call__(self, work: Callable[[], object]) -> None:
        """Do this when all that was asked before is done."""
        self._going.append(self._thread.submit(work))

    def wait(self) -> None:
        """Return when all is done, and raise what it raised."""
        going, self._going = self._going, []
        for one in going:
            one.result()

    def close(self) -> None:
        """The same, and nothing more will be asked."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
