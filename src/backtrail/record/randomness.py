"""Random number generators: noting their states, and putting them back after a probe."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import TypeVar

import numpy as np
import torch

State = TypeVar("State")
MOST = 2000  # objects looked at in search of a data set's own generators
LIBRARIES = frozenset(
    {"torch", "numpy", "random", "backtrail"}
)  # their code refers to no generator of the user's


def generators(device: torch.device) -> dict[str, bytes]:
    """States of torch's generators that a forward pass on the device can draw from, by device."""
    states = {"cpu": bytes(torch.get_rng_state().numpy())}
    if device.type == "cuda":
        states[str(device)] = bytes(torch.cuda.get_rng_state(device).numpy())
    return states


@contextmanager
def preserved(holder: object) -> Iterator[None]:
    """Leave every generator as it was: torch's, numpy's, Python's, and those within reach of the holder."""
    restore: list[Callable[[], None]] = [
        put for found in _held_generators(holder) if (put := _restorer(found))
    ]
    restore += [
        _later(random.setstate, random.getstate()),
        _later(np.random.set_state, np.random.get_state()),
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for put_back in restore:
                put_back()


def _later(function: Callable[[State], object], state: State) -> Callable[[], None]:
    def restore() -> None:
        function(state)

    return restore


def _restorer(found: object) -> Callable[[], None] | None:
    match found:
        case torch.Generator():
            return _later(found.set_state, found.get_state())
        case random.Random():
            return _later(found.setstate, found.getstate())
        case np.random.Generator():
            bits, state = found.bit_generator, found.bit_generator.state
            return partial(setattr, bits, "state", state)
        case np.random.RandomState():
            return _later(found.set_state, found.get_state())
    return None


def _held_generators(data: object) -> list[object]:
    """Generators reachable from the data set through attributes and small containers."""
    seen: dict[int, object] = {}
    waiting: list[object] = [data]
    found: list[object] = []
    while waiting and len(seen) < MOST:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(
            value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
        ):
            found.append(value)
        else:
            waiting += _inside(value)
    return found


def _inside(value: object) -> list[object]:
    match value:
        case dict():
            return list(value.values())[:MOST]
        case list() | tuple():
            return list(value[:50])  # a longer one is rows, not transforms
        case partial():
            return [value.func, value.args, value.keywords]
        case FunctionType():
            return _named_in(value)
        case torch.Tensor() | np.ndarray() | str() | bytes() | type() | ModuleType():
            return []
    methods = [
        member
        for kind in type(value).__mro__
        for member in vars(kind).values()
        if _is_users(member)
    ]
    return [
        *methods,
        getattr(value, "__func__", None),
        getattr(value, "__self__", None),
        getattr(value, "__dict__", {}),
    ]


def _named_in(function: FunctionType) -> list[object]:
    """What a function of the user's refers to: its closure, and the globals that its code names."""
    if not _is_users(function):
        return []
    names = (name for name in function.__code__.co_names if name in function.__globals__)
    return [
        *map(_contents, function.__closure__ or ()),
        *(function.__globals__[name] for name in names),
    ]


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_users(member: object) -> bool:
    return (
        isinstance(member, FunctionType)
        and (member.__module__ or "").split(".")[0] not in LIBRARIES
    )
