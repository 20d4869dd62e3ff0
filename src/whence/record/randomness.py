"""Random number generators: noting their states, and putting them back after a probe."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

MOST = 2000  # objects looked at in search of a data set's own generators


def generators(device: torch.device) -> dict[str, bytes]:
    """States of torch's generators that a forward pass on the device can draw from, by device."""
    states = {"cpu": bytes(torch.get_rng_state().numpy())}
    if device.type == "cuda":
        states[str(device)] = bytes(torch.cuda.get_rng_state(device).numpy())
    return states


@contextmanager
def preserved(data: object) -> Iterator[None]:
    """Leave every generator as it was: torch's, numpy's, Python's, and those that the data set holds."""
    restore: list[Callable[[], None]] = [restorer for found in _held_generators(data) if (restorer := _restorer(found))]
    restore += [
        _later(random.setstate, random.getstate()),
        _later(np.random.set_state, np.random.get_state()),  # noqa: NPY002
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for put_back in restore:
                put_back()


def _later(function: Callable[[Any], Any], state: Any) -> Callable[[], None]:
    return lambda: function(state)


def _restorer(found: object) -> Callable[[], None] | None:
    match found:
        case torch.Generator():
            return _later(found.set_state, found.get_state())
        case random.Random():
            return _later(found.setstate, found.getstate())
        case np.random.Generator():
            bits, state = found.bit_generator, found.bit_generator.state
            return lambda: setattr(bits, "state", state)
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
        if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
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
        case torch.Tensor() | np.ndarray() | str() | bytes() | type():
            return []
    closure = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return [*closure, getattr(value, "__self__", None), getattr(value, "__dict__", {})]
