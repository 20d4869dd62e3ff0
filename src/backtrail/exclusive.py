"""One call at a time in a process, for everything that replays a training or reads a task's model.

A replay has to change what belongs to the whole process: it sets torch's default random generators
to the recorded states, chooses the attention kernel, and replaces torch's checkpoint functions. It
also sets the train/eval modes of the task's copy of the model, which all runs of that task share.
Two threads that did so at once would compute with each other's dropout masks and modes, and get
wrong numbers without any error. So every public function that does this is decorated with
`exclusive` (a generator with `exclusive_steps`): a second thread waits until the first has
returned. One thread may nest such calls freely.

What this cannot prevent is another thread that trains, or draws from torch's default generators,
without calling backtrail: see docs/threads.md.
"""

import os
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import islice
from typing import ParamSpec, TypeVar, final

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
SECONDS_BETWEEN_SIGNALS = 0.1


@final
class _Process:
    """Which thread of this process is inside an exclusive call.

    Attributes:
        lock: held by that thread. Only its owner can release such a lock.
        owner: identity of that thread; None while there is none.
    """

    def __init__(self) -> None:
        self.start_without_owner()

    def start_without_owner(self) -> None:
        """Begin with a lock that no thread holds."""
        self.lock = threading.RLock()
        self.owner: int | None = None

    def continue_after_fork(self) -> None:
        """Free a lock whose owner does not exist in the forked child, which has one thread."""
        if self.owner != threading.get_ident():
            self.start_without_owner()


_process = _Process()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.continue_after_fork)


def exclusive(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let only one thread at a time be inside any function that is decorated like this.

    >>> @exclusive
    ... def double(number):
    ...     return 2 * number
    >>> double(4)
    8
    """

    @wraps(function)
    def call_exclusively(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        me = threading.get_ident()
        if _process.owner == me:
            return function(*args, **kwargs)
        lock = _process.lock
        try:
            # Python acts on a signal only between two waits: libraries (polars does) install
            # handlers that make an interrupted wait go on.
            while not lock.acquire(timeout=SECONDS_BETWEEN_SIGNALS):
                pass
            _process.owner = me
            return function(*args, **kwargs)
        finally:
            # A KeyboardInterrupt may come before the lock is acquired, or after it and before the
            # owner is noted. So the lock itself has to tell whether it is ours.
            if _process.owner == me:
                _process.owner = None
            try:  # noqa: SIM105 - a call before the release is one more moment for an interrupt
                lock.release()
            except RuntimeError:
                pass

    return call_exclusively


def exclusive_steps(
    function: Callable[Arguments, Iterator[Result]],
) -> Callable[Arguments, Iterator[Result]]:
    """Do the same for a generator function: the lock is held for each step, never across a yield.

    Between two steps another thread may run, so a generator must not leave anything of the process
    changed when it yields.

    >>> @exclusive_steps
    ... def count(stop):
    ...     yield from range(stop)
    >>> list(count(3))
    [0, 1, 2]
    """

    @wraps(function)
    def step_exclusively(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Result]:
        # Not a generator itself, so that wrong arguments are an error at the call.
        return _exclusive_items(function(*args, **kwargs))

    return step_exclusively


def _exclusive_items(iterator: Iterator[Result]) -> Iterator[Result]:
    """Yield the items of an iterator, each taken while the lock is held."""
    while taken := _take_one(iterator):
        yield taken.pop()


@exclusive
def _take_one(iterator: Iterator[Result]) -> list[Result]:
    """Take the next item of an iterator; nothing at its end."""
    return list(islice(iterator, 1))
