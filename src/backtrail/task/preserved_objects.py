"""Puts the user's own objects back after the recorder has called the user's code.

A self-check calls the task's loss and `predict`, and reads rows of its data set, once more than the
training does. Such code may have memory: a counter, a running mean in a closure, buffers of a loss
module, a list that is logged to. So everything that is reachable from it is noted before a check,
and put back after it.

What is reachable: attributes, containers, closures, and the globals that the user's functions name.
Modules that are installed (torch, transformers, ...) are left out: their globals are switches that
must not be turned back, such as "this operator is registered".
"""

import itertools
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import (
    CellType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backtrail.errors import ChangedByCheck
from backtrail.task.activation_checkpointing import names_in
from backtrail.tree import count_writes

MAX_OBJECTS = 20_000  # objects that are looked at
MAX_ITEMS = 1_000  # items of a container that are followed; all of them are put back
MAX_COPIED = 2**22  # entries of a tensor or array that is copied; a larger one is only watched
INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")})
# Objects of these packages are not put back, except modules and containers.
NOT_FOLLOWED = frozenset({"backtrail", "torch", "numpy", "builtins"})
MISSING = object()

Restore = Callable[[], None]
Moved = Callable[[], bool]


@contextmanager
def preserved_objects(*holders: object, step: int | None = None) -> Iterator[None]:
    """Put back every object that is reachable from some others when the block ends.

    So are the global generators of Python and NumPy.

    Args:
        *holders: functions, modules, data sets: what the block calls.
        step: number of the step, for the message; None: unknown.

    Raises:
        ChangedByCheck: the block changed something that cannot be put back (an iterator that is
            advanced, a very large tensor).
    """
    notes = _Notes()
    notes.restorers.append(partial(random.setstate, random.getstate()))
    notes.restorers.append(partial(np.random.set_state, np.random.get_state()))
    for holder in holders:
        notes.take(holder)
    try:
        yield
    finally:
        for restore in reversed(notes.restorers):
            restore()
    for description, moved in notes.watched:
        if moved():
            raise ChangedByCheck(step, description)


class _Notes:
    """What is to be put back, and what is only watched."""

    def __init__(self) -> None:
        self.restorers: list[Restore] = []
        self.watched: list[tuple[str, Moved]] = []
        self._seen: dict[int, object] = {}  # kept, so that ids stay unique

    def take(self, holder: object) -> None:
        """Note all that is reachable from an object."""
        pending = deque([holder])
        limit = len(self._seen) + MAX_OBJECTS
        # Breadth first: what is near is more likely to be changed.
        while pending and len(self._seen) < limit:
            value = pending.popleft()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                pending.extend(self._note(value))

    def _note(self, value: object) -> Iterable[object]:
        """Note one object; return what it refers to."""
        match value:
            case None | bool() | int() | float() | str() | bytes() | ModuleType():
                return ()
            case Tensor():
                self._note_tensor(value)
                return ()
            case torch.Generator():
                self.restorers.append(partial(_restore_generator, value, value.get_state()))
                return ()
            case random.Random():
                self.restorers.append(partial(value.setstate, value.getstate()))
                return ()
            case np.random.Generator():
                bits = value.bit_generator
                self.restorers.append(partial(setattr, bits, "state", bits.state))
                return ()
            case np.random.RandomState():
                self.restorers.append(partial(value.set_state, value.get_state()))
                return ()
            case np.ndarray():
                self._note_array(value)
                return ()
            case dict():
                self.restorers.append(partial(_restore_dict, value, dict(value)))
                return itertools.islice(list(value.values()), MAX_ITEMS)
            case list() | deque():
                self.restorers.append(partial(_restore_sequence, value, list(value)))
                return itertools.islice(list(value), MAX_ITEMS)
            case set():
                self.restorers.append(partial(_restore_set, value, set(value)))
                return ()
            case bytearray():
                self.restorers.append(partial(_restore_bytes, value, bytes(value)))
                return ()
            case tuple():
                return value[:MAX_ITEMS]
            case partial():
                return (value.func, value.args, value.keywords)
            case MethodType():
                return (value.__func__, value.__self__)
            case FunctionType():
                return self._note_function(value)
            case type():
                return self._note_class(value)
            case GeneratorType() | itertools.count():
                position = _position(value)
                what = f"advanced the {type(value).__name__} that it reads from"
                self.watched.append((what, lambda: _position(value) != position))
                return ()
        return self._note_instance(value)

    def _note_tensor(self, tensor: Tensor) -> None:
        # A check computes with tensors of its own in place of the model's parameters.
        if isinstance(tensor, nn.Parameter) or tensor.layout != torch.strided:
            return
        if tensor.is_meta or tensor.numel() == 0:
            return
        if tensor.numel() <= MAX_COPIED:
            copy = tensor.detach().clone()
            had_graph = tensor.requires_grad
            self.restorers.append(partial(_restore_tensor, tensor, copy, had_graph=had_graph))
            return
        writes = count_writes(tensor)
        what = f"wrote to a tensor of shape {list(tensor.shape)}"
        self.watched.append((what, lambda: count_writes(tensor) != writes))

    def _note_array(self, array: np.ndarray) -> None:
        if array.size <= MAX_COPIED and array.flags.writeable:
            self.restorers.append(partial(_restore_array, array, array.copy()))

    def _note_function(self, function: FunctionType) -> list[object]:
        """A function's closure, defaults and attributes, and the globals that its code names."""
        if _is_installed(function.__code__.co_filename):
            return [_content(cell) for cell in function.__closure__ or ()]
        found: list[object] = [function.__defaults__, function.__kwdefaults__]
        if vars(function):
            found.append(vars(function))
        for cell in function.__closure__ or ():
            content = _content(cell)
            self.restorers.append(partial(_restore_cell, cell, content))
            found.append(content)
        names = names_in(function.__code__)
        variables = function.__globals__
        for name in names:
            if name not in variables:
                continue
            value = variables[name]
            if isinstance(value, ModuleType):
                found += self._note_module(value, names)
            else:
                self.restorers.append(partial(_restore_entry, variables, name, value))
                found.append(value)
        return found

    def _note_module(self, module: ModuleType, names: frozenset[str]) -> list[object]:
        """The members of the user's own module that some code names."""
        path = getattr(module, "__file__", None)
        if path is None or _is_installed(path):
            return []
        members = vars(module)
        found: list[object] = []
        for name in names & members.keys():
            if not isinstance(members[name], ModuleType):
                self.restorers.append(partial(_restore_entry, members, name, members[name]))
                found.append(members[name])
        return found

    def _note_class(self, kind: type) -> list[object]:
        """Attributes of the user's own class, and its methods."""
        if _is_library_class(kind):
            return []
        found: list[object] = []
        for name, member in list(vars(kind).items()):
            match member:
                case FunctionType():
                    found.append(member)
                case staticmethod() | classmethod():
                    found.append(member.__func__)
                case property():
                    found.append(member.fget)
                case _ if not name.startswith("__") and not hasattr(member, "__get__"):
                    self.restorers.append(partial(_restore_attribute, kind, name, member))
                    found.append(member)
        return found

    def _note_instance(self, value: object) -> list[object]:
        kind = type(value)
        attributes = getattr(value, "__dict__", None)
        is_users = isinstance(value, (nn.Module, SimpleNamespace)) or not _is_library_class(kind)
        if not is_users:
            # A wrapper of torch's, such as `Subset`, may hold an object of the user's.
            is_torchs = kind.__module__.partition(".")[0] == "torch"
            return list(attributes.values()) if is_torchs and attributes else []
        found: list[object] = list(kind.__mro__)
        if isinstance(attributes, dict):
            found.append(attributes)
        for base in kind.__mro__:
            for name in _slots(base):
                member = getattr(value, name, MISSING)
                if member is not MISSING:
                    self.restorers.append(partial(_restore_slot, value, name, member))
                    found.append(member)
        return found


def _restore_dict(container: dict[Any, Any], items: dict[Any, Any]) -> None:
    same_keys = list(container) == list(items)
    if same_keys and all(container[key] is items[key] for key in items):
        return
    container.clear()
    container.update(items)


def _restore_sequence(container: "list[Any] | deque[Any]", items: list[Any]) -> None:
    now = list(container)
    if len(now) == len(items) and all(a is b for a, b in zip(now, items, strict=True)):
        return
    container.clear()
    container.extend(items)


def _restore_set(container: set[Any], items: set[Any]) -> None:
    if container != items:
        container.clear()
        container.update(items)


def _restore_bytes(container: bytearray, content: bytes) -> None:
    if container != content:
        container[:] = content


def _restore_tensor(tensor: Tensor, copy: Tensor, *, had_graph: bool) -> None:
    if tensor.requires_grad and not had_graph:
        # A check wrote to it what depends on the parameters.
        tensor.detach_()
    # Only where it changed: a write would be noticed by the graph of the training.
    now = tensor.detach()
    if now.shape != copy.shape or not _same_bits(now, copy):
        with torch.no_grad():
            if now.shape != copy.shape:
                now.resize_(copy.shape)
            now.copy_(copy)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if torch.equal(left, right):
        return True
    if not left.is_floating_point():
        return False
    # NaN differs from itself.
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def _restore_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _restore_array(array: np.ndarray, copy: np.ndarray) -> None:
    array[...] = copy


def _restore_cell(cell: CellType, content: object) -> None:
    if _content(cell) is content:
        return
    if content is MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = content


def _restore_entry(variables: dict[str, Any], name: str, value: object) -> None:
    if variables.get(name, MISSING) is value:
        return
    if value is MISSING:
        del variables[name]
    else:
        variables[name] = value


def _restore_attribute(kind: type, name: str, value: object) -> None:
    if vars(kind).get(name, MISSING) is not value:
        setattr(kind, name, value)


def _restore_slot(holder: object, name: str, value: object) -> None:
    if getattr(holder, name, MISSING) is not value:
        object.__setattr__(holder, name, value)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable is not assigned yet
        return MISSING


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _is_installed(path: str) -> bool:
    return path.startswith(("<frozen", *INSTALLED))


def _is_library_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__ or "")
    if (kind.__module__ or "").partition(".")[0] in NOT_FOLLOWED:
        return True
    path = getattr(module, "__file__", None)
    return path is not None and _is_installed(path)


def _position(iterator: object) -> object:
    """Something that differs once the iterator was advanced."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        if frame is None:
            return "exhausted"
        return frame.f_lasti, {name: id(value) for name, value in frame.f_locals.items()}
    return repr(iterator)
