"""Activation checkpointing: a forward pass that is computed again in the backward pass, to the same numbers.

A replay hands a module its parameters for one call alone, so that it cannot be computed again
later; and `torch.func` refuses it. It computes such a part once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint

LATER, REENTRANT = (
    "_checkpoint_without_reentrant_generator",
    "CheckpointFunction",
)  # torch's two ways


@contextmanager
def computed_once() -> Iterator[None]:
    """While the block runs, `torch.utils.checkpoint.checkpoint` only calls its function."""
    ways = {name: getattr(checkpoint, name) for name in (LATER, REENTRANT)}
    setattr(checkpoint, LATER, _once)
    setattr(checkpoint, REENTRANT, _Once)
    try:
        yield
    finally:
        for name, way in ways.items():
            setattr(checkpoint, name, way)


def _once(*args: object, **kwargs: object) -> Iterator[None]:
    """Before the function, which torch calls itself, and after it."""
    del args, kwargs
    yield


class _Once:
    """In place of a `torch.autograd.Function`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: object, *args: Any) -> Any:
        """Call the function."""
        del preserve
        return function(*args)
