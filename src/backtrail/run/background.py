"""A background thread that does disk work in order while the training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final


@final
class BackgroundThread:
    """One thread for disk writes and checksums, both of which release the GIL.

    Work is done in the order in which it was submitted. After an error, what was submitted before
    the error is raised is not done: it may build on what failed.

    >>> thread = BackgroundThread()
    >>> results = []
    >>> thread.submit(lambda: results.append(1))
    >>> thread.wait()
    >>> results
    [1]
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="backtrail")
        self._pending: list[Future[None]] = []
        self._failed = False  # since the last error was raised

    def submit(self, work: Callable[[], object]) -> None:
        """Call `work` after everything that was submitted before."""
        future = self._executor.submit(self._run, work)
        self._pending.append(future)

    def _run(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        """Wait until all work is done, and raise the first error of it."""
        # Cleared first: an error is raised once, not again by every later call.
        pending = self._pending
        self._pending = []
        errors = [future.exception() for future in pending]
        self._failed = False
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Wait until all work is done, raise the first error of it, and end the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
