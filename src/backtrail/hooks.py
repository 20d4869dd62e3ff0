"""Hooks on a live model that have no effect in a copy of it.

`torch.save(model)` and `copy.deepcopy(model)` inside a recorded loop take the hooks of the
recording along. Those of a copy must neither keep it from being stored nor report its calls.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, final


@final
class LocalHook:
    """A hook that is pickled and copied as a function without effect.

    That function is one of Python's own, so that a model stored in a recorded loop can be loaded
    where this library is not installed.

    >>> import copy
    >>> calls = []
    >>> hook = LocalHook(calls.append)
    >>> hook("a module")
    >>> copy.deepcopy(hook)("a copied module")
    >>> calls
    ['a module']
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        """Copy it as `nullcontext().__exit__`, which takes any arguments and returns None."""
        return getattr, (nullcontext(), "__exit__")
