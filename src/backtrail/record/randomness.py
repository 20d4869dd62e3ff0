"""Random number generators: reading their states, and restoring them after a self-check."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import TypeVar

import numpy as np
import torch

GeneratorState = TypeVar("GeneratorState")
MAX_OBJECTS = 2000  # objects inspected in search of a data set's own generators
MAX_LIST = 50  # items of a list that are inspected; a longer one holds rows, not transforms
# The code of these packages refers to no generator that belongs to the user.
LIBRARIES = frozenset({"torch", "numpy", "random", "backtrail"})


def generator_states(device: torch.device) -> dict[str, bytes]:
    """States of torch's generators that a forward pass on the device can draw from, by device."""
    states = {"cpu": bytes(torch.get_rng_state().numpy())}
    if device.type == "cuda":
        states[str(device)] = bytes(torch.cuda.get_rng_state(device).numpy())
    return states


@contextmanager
def preserved_generators(holder: object) -> Iterator[None]:
    """Restore every random generator when the block ends.

    These are the global ones of torch, NumPy and Python, and those that can be reached from
    `holder` (a data set with random transforms, say). The self-check reads rows and runs the model,
    and the training after it must draw the same numbers as without it.
    """
    restorers: list[Callable[[], None]] = []
    for generator in _reachable_generators(holder):
        restorer = _restorer(generator)
        if restorer is not None:
            restorers.append(restorer)
    restorers.append(_restore_later(random.setstate, random.getstate()))
    restorers.append(_restore_later(np.random.set_state, np.random.get_state()))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for restore in restorers:
                restore()


def _restore_later(
    set_state: Callable[[GeneratorState], object], state: GeneratorState
) -> Callable[[], None]:
    def restore() -> None:
        set_state(state)

    return restore


def _restorer(generator: object) -> Callable[[], None] | None:
    """Return a function that puts the generator back into its present state."""
    match generator:
        case torch.Generator():
            return _restore_later(generator.set_state, generator.get_state())
        case random.Random():
            return _restore_later(generator.setstate, generator.getstate())
        case np.random.Generator():
            bits = generator.bit_generator
            return partial(setattr, bits, "state", bits.state)
        case np.random.RandomState():
            return _restore_later(generator.set_state, generator.get_state())
    return None


def _reachable_generators(holder: object) -> list[object]:
    """Generators that can be reached through attributes, small containers and functions."""
    kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    # The objects themselves are kept, or an id could be reused while the search goes on.
    seen: dict[int, object] = {}
    pending: list[object] = [holder]
    generators: list[object] = []
    while pending and len(seen) < MAX_OBJECTS:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, kinds):
            generators.append(value)
        else:
            pending += _referenced_by(value)
    return generators


def _referenced_by(value: object) -> list[object]:
    """Objects that a value refers to, as far as generators may hide behind them."""
    match value:
        case dict():
            return list(value.values())[:MAX_OBJECTS]
        case list() | tuple():
            return list(value[:MAX_LIST])
        case partial():
            return [value.func, value.args, value.keywords]
        case FunctionType():
            return _referenced_by_function(value)
        case torch.Tensor() | np.ndarray() | str() | bytes() | type() | ModuleType():
            return []
    found: list[object] = []
    for kind in type(value).__mro__:
        found += [member for member in vars(kind).values() if _is_user_function(member)]
    # A bound method has its function and its object in these two attributes.
    found.append(getattr(value, "__func__", None))
    found.append(getattr(value, "__self__", None))
    found.append(getattr(value, "__dict__", {}))
    return found


def _referenced_by_function(function: FunctionType) -> list[object]:
    """What a user's function refers to: its closure, and the globals that its code names."""
    if not _is_user_function(function):
        return []
    contents = [_cell_contents(cell) for cell in function.__closure__ or ()]
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    return contents + [function.__globals__[name] for name in names]


def _cell_contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable is not assigned yet
        return None


def _is_user_function(member: object) -> bool:
    if not isinstance(member, FunctionType):
        return False
    package = (member.__module__ or "").split(".")[0]
    return package not in LIBRARIES
