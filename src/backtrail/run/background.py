"""A background thread that does disk work in order while the training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final


@final
class BackgroundThread:
    """One thread for disk writes and checksums, both of which release the GIL.

    Work is done in the order in which it was submitted.

    >>> thread = BackgroundThread()
    >>> results = []
    >>> thread.submit(lambda: results.append(1))
    >>> thread.wait()
    >>> results
    [1]
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="backtrail")
        self._pending: list[Future[object]] = []

    def submit(self, work: Callable[[], object]) -> None:
        """Call `work` after everything that was submitted before."""
        future = self._executor.submit(work)
        self._pending.append(future)

    def wait(self) -> None:
        """Wait until all work is done, and raise the first error of it."""
        # Cleared first: an error is raised once, not again by every later call.
        pending = self._pending
        self._pending = []
        for future in pending:
            future.result()

    def close(self) -> None:
        """Wait until all work is done, raise the first error of it, and end the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
