"""Activation checkpointing: parts of a forward pass that are computed again in the backward pass.

A replay gives the model its parameters for one call only, so nothing of it can be computed again
later; and torch.func refuses it. Such a part is computed once instead, which gives the same
numbers.

torch has no switch for this, so its two implementations in `torch.utils.checkpoint` are replaced
while the model is called. They belong to the whole process, so this is done only for models that
may use them. That has to be known before the first call, which may be one in eval mode that does
not checkpoint anything, or one under torch.func that fails. So `uses_checkpointing` reads the code
that a call may run. It errs on the safe side: a model that only could use checkpointing counts.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, final

from torch import nn
from torch.utils import checkpoint

from backtrail.task.replacement import Replacement

# torch's implementations: with use_reentrant=False, and with True.
GENERATOR = "_checkpoint_without_reentrant_generator"
if hasattr(checkpoint, "_checkpoint_without_reentrant_generator_impl"):  # torch 2.14
    GENERATOR = "_checkpoint_without_reentrant_generator_impl"
FUNCTION = "CheckpointFunction"
MODULE = checkpoint.__name__
# Code of these leads nowhere else: they take no functions of the model's from global names.
LIBRARIES = frozenset({"torch", "numpy"}) | sys.stdlib_module_names
RUN_BY_CALL = ("__call__", "forward")
RUN_BY_MAKING = ("__new__", "__init__")
MAX_STEPS = 50_000  # of the search, after which checkpointing counts as used
MAX_ENTRIES = 50  # of a container; a longer one holds data

_in_block: ContextVar[bool] = ContextVar("in_block", default=False)  # of this thread


@contextmanager
def computed_once() -> Iterator[None]:
    """While the block runs, `torch.utils.checkpoint.checkpoint` of this thread calls its function.

    Other threads, such as one that trains, keep torch's own implementations.
    """
    _REPLACEMENT.begin()
    before = _in_block.set(True)
    try:
        yield
    finally:
        _in_block.reset(before)
        _REPLACEMENT.end()


def _compute_once(*args: object, **kwargs: object) -> Iterator[None]:
    """In the place of a generator that prepares before torch calls the function, and ends after."""
    if _in_block.get():
        yield
    else:
        yield from _REPLACEMENT.originals[GENERATOR](*args, **kwargs)


@final
class _ComputeOnce:
    """In the place of a `torch.autograd.Function`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: object, *args: Any) -> Any:
        """Call the function."""
        if _in_block.get():
            return function(*args)
        return _REPLACEMENT.originals[FUNCTION].apply(function, preserve, *args)


_REPLACEMENT = Replacement(checkpoint, {GENERATOR: _compute_once, FUNCTION: _ComputeOnce})


def uses_checkpointing(model: nn.Module, *functions: object) -> bool:
    """Whether a call of a model or of these functions may use `torch.utils.checkpoint`.

    Follows the names in the code of all forward methods: attributes of the modules, globals,
    closures, and imported functions of other modules than torch's.

    >>> uses_checkpointing(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    False
    """
    search = _Search()
    for module in model.modules():
        search.look_at(module)
    for function in functions:
        search.look_at(function)
    return search.finds_checkpoint()


@final
class _Search:
    """A search for `torch.utils.checkpoint` among what code refers to."""

    def __init__(self) -> None:
        self._waiting: list[tuple[object, object]] = []  # values, and whose attribute they are
        self._seen: dict[tuple[int, int], tuple[object, object]] = {}  # kept, so that ids stay

    def look_at(self, value: object, owner: object = None) -> None:
        """Look at a value later; `owner` is what `self` is in it, if it is a method."""
        key = id(value), id(owner)
        if key not in self._seen:
            self._seen[key] = value, owner
            self._waiting.append((value, owner))

    def finds_checkpoint(self) -> bool:
        """Look at all that is reached."""
        while self._waiting:
            value, owner = self._waiting.pop()
            if _is_checkpoint(value) or len(self._seen) > MAX_STEPS:
                return True
            match value:
                case FunctionType():
                    if self._reads_function(value, owner):
                        return True
                case MethodType():
                    self.look_at(value.__func__, value.__self__)
                case staticmethod() | classmethod():
                    self.look_at(value.__func__, owner)
                case property():
                    self.look_at(value.fget, owner)
                case partial():
                    self.look_at(value.func)
                    self._look_at_entries([*value.args, *value.keywords.values()])
                case dict():
                    self._look_at_entries(list(value.values()))
                case list() | tuple():
                    self._look_at_entries(value)
                case type():
                    if not _is_library(value):
                        self._look_at_class(value)
                case _:
                    self._look_at_methods(RUN_BY_CALL, type(value), value)
        return False

    def _look_at_entries(self, entries: list[Any] | tuple[Any, ...]) -> None:
        if len(entries) <= MAX_ENTRIES:
            for entry in entries:
                self.look_at(entry)

    def _look_at_class(self, kind: type) -> None:
        """What runs where code makes an object and calls it."""
        self._look_at_methods(RUN_BY_CALL, kind, None)
        # A forward pass makes no modules; those of transformers are made by code that can switch
        # checkpointing on.
        if not issubclass(kind, nn.Module):
            self._look_at_methods(RUN_BY_MAKING, kind, None)

    def _look_at_methods(self, names: tuple[str, ...], kind: type, owner: object) -> None:
        """Methods of a class, or what an object has in their place, e.g. a forward of its own."""
        for name in names:
            method = _static_attribute(owner, kind, name)
            if isinstance(method, (FunctionType, MethodType, staticmethod, classmethod, partial)):
                self.look_at(method, owner)

    def _reads_function(self, function: FunctionType, owner: object) -> bool:
        """Look at what a function refers to; whether that is the checkpoint module by its name."""
        names = names_in(function.__code__)
        if any(name.startswith(MODULE) for name in names):
            return True  # it is imported in the function itself
        for name in names:
            if owner is not None:
                self.look_at(_static_attribute(owner, type(owner), name), owner)
        for cell in function.__closure__ or ():
            try:
                self.look_at(cell.cell_contents)
            except ValueError:
                continue  # the variable is not assigned yet
        self.look_at(getattr(function, "__wrapped__", None), owner)
        if _is_library(function):
            return False
        for name in names & function.__globals__.keys():
            self._look_at_global(function.__globals__[name], names)
        return False

    def _look_at_global(self, value: object, names: frozenset[str]) -> None:
        """Look at a global; of a module, at its members that are named as well (torch.utils...)."""
        if not isinstance(value, ModuleType):
            self.look_at(value)
            return
        if _is_checkpoint(value):
            self.look_at(value)
            return
        for name in names & vars(value).keys():
            member = vars(value)[name]
            if isinstance(member, ModuleType) and member is not value:
                if member.__name__.startswith(f"{value.__name__}."):
                    self._look_at_global(member, names)
            elif not _is_library(value):
                self.look_at(member)


def _is_checkpoint(value: object) -> bool:
    """Whether it is the module `torch.utils.checkpoint`, or a function or class of it."""
    if isinstance(value, ModuleType):
        return value.__name__ == MODULE
    is_code = isinstance(value, (type, FunctionType))
    return is_code and getattr(value, "__module__", "") == MODULE


def _is_library(value: object) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return str(name).partition(".")[0] in LIBRARIES


def names_in(code: CodeType) -> frozenset[str]:
    """Names of globals and attributes in a function's code and in the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return frozenset(names)


def _static_attribute(owner: object, kind: type, name: str) -> object:
    """An attribute as it is stored; nothing is called, such as a property of the user's."""
    own = getattr(owner, "__dict__", {})
    if name in own:
        return own[name]
    for base in kind.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return None
