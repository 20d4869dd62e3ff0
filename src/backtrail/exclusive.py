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
from contextlib import AbstractContextManager
from functools import wraps
from typing import ParamSpec, TypeVar, final

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@final
class _ProcessLock:
    """The lock of this process.

    Attributes:
        current: may be entered several times by one thread.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Start with a lock that no thread holds."""
        self.current = threading.RLock()


_process = _ProcessLock()

if hasattr(os, "register_at_fork"):
    # The thread that held the lock does not exist in a forked child, so nobody would release it.
    # It is a new lock, not the old one reset: the forking thread may hold the old one, and
    # releases it in the child as well.
    os.register_at_fork(after_in_child=_process.renew)


def exclusive_lock() -> AbstractContextManager[bool]:
    """Return the lock, to be entered by `with` where there is no function to decorate.

    It is handed out as it is, not wrapped in a generator-based context manager, in which a
    KeyboardInterrupt between entering and the `with` block would leave it locked.
    """
    return _process.current


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
        with exclusive_lock():
            return function(*args, **kwargs)

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
        iterator = function(*args, **kwargs)
        while True:
            with exclusive_lock():
                try:
                    result = next(iterator)
                except StopIteration:
                    return
            yield result

    return step_exclusively
