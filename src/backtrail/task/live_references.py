"""Functions of a copied model that still refer to the model it was copied from.

`copy.deepcopy` copies a function as itself, with its closure. So a `forward` that was replaced on
the instance, a hook, or a lambda among a module's attributes may go on calling the live model: its
weights in place of those that a replay gives, under an autocast that a replay leaves out.

* A `forward` on the instance that wraps the class's own (as accelerate's, for autocast) is removed
  from the copy. Whether the wrapper changes what is computed is seen by the recorder's self-check.
* Any other function is built again, with the copy's modules in place of the live ones.
"""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, final

from torch import nn

from backtrail.errors import LiveParameter
from backtrail.task.activation_checkpointing import names_in

MAX_DEPTH = 12  # of wrappers around wrappers


def detach_from_live(live: nn.Module, copied: nn.Module, memo: Mapping[int, Any]) -> list[str]:
    """Let no function of a copied model refer to the live one.

    Args:
        live: the model.
        copied: its copy.
        memo: copies of objects by the objects' ids, as `copy.deepcopy` filled it.

    Returns:
        Names of the modules whose `forward` on the instance was removed.

    Raises:
        LiveParameter: a function uses a parameter of the live model directly.
    """
    names = {id(parameter): name for name, parameter in live.named_parameters()}
    modules = {id(module): memo[id(module)] for module in live.modules() if id(module) in memo}
    rebinding = _Rebinding(modules, names)
    removed: list[str] = []
    for name, module in copied.named_modules():
        if "forward" in vars(module) and _leads_to(vars(module)["forward"], type(module).forward):
            del vars(module)["forward"]
            removed.append(name)
        for key, value in list(vars(module).items()):
            changed = rebinding.of(value, f"{key} of module {name!r}")
            if changed is not value:
                vars(module)[key] = changed
    return removed


def _leads_to(value: object, own: object, depth: int = 0) -> bool:
    """Whether a callable is, or wraps, the class's own `forward`."""
    if value is own:
        return True
    if depth > MAX_DEPTH:
        return False
    return any(_leads_to(inner, own, depth + 1) for inner in _wrapped_by(value))


def _wrapped_by(value: object) -> Iterable[object]:
    """What a wrapper may call."""
    match value:
        case MethodType():
            return (value.__func__,)
        case partial():
            return (value.func, *value.args, *vars(value).values())
        case FunctionType():
            return (*vars(value).values(), *_contents(value))
        case nn.Module() | type() | str() | int() | float():
            return ()
    if callable(value):
        return tuple(getattr(value, "__dict__", {}).values())
    return ()


@final
class _Rebinding:
    """Builds functions again, with the copy's modules in place of the live ones.

    Args:
        modules: the copied modules, by the ids of the live ones.
        parameters: names of the live parameters, by id.
    """

    def __init__(self, modules: Mapping[int, nn.Module], parameters: Mapping[int, str]) -> None:
        self._modules = modules
        self._parameters = parameters
        self._done: dict[int, tuple[object, Any]] = {}  # with the original, so that ids stay

    def of(self, value: Any, place: str) -> Any:
        """The value itself, or one that refers to the copy where it referred to the live model.

        Raises:
            LiveParameter: it is a parameter of the live model.
        """
        if id(value) in self._modules:
            return self._modules[id(value)]
        if id(value) in self._parameters:
            raise LiveParameter(self._parameters[id(value)], place)
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = (value, value)  # while it is looked at, for cycles
        found = self._rebuilt(value, place)
        self._done[id(value)] = (value, found)
        return found

    def _rebuilt(self, value: Any, place: str) -> Any:
        match value:
            case FunctionType():
                return self._function(value, place)
            case MethodType():
                function = self.of(value.__func__, place)
                holder = self._holder(value.__self__, place)
                if function is value.__func__ and holder is value.__self__:
                    return value
                return MethodType(function, holder)
            case partial():
                function = self.of(value.func, place)
                args = tuple(self.of(arg, place) for arg in value.args)
                keywords = self._mapping(value.keywords, place)
                same_args = all(a is b for a, b in zip(args, value.args, strict=True))
                if function is value.func and same_args and keywords is value.keywords:
                    return value
                return partial(function, *args, **keywords)
            case dict() if type(value).__name__ in {"dict", "OrderedDict"}:
                return self._mapping(value, place)
            case list() | tuple() if type(value) in {list, tuple}:
                items = [self.of(item, place) for item in value]
                if all(a is b for a, b in zip(items, value, strict=True)):
                    return value
                return type(value)(items)
        return value

    def _mapping(self, value: Any, place: str) -> Any:
        items = {key: self.of(item, place) for key, item in value.items()}
        if all(items[key] is value[key] for key in items):
            return value
        changed = copy.copy(value)
        changed.update(items)
        return changed

    def _holder(self, value: Any, place: str) -> Any:
        """An object that functions read: with the copied modules among its attributes."""
        if id(value) in self._modules or isinstance(value, (nn.Module, type)):
            return self.of(value, place)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return self.of(value, place)
        replaced = {
            key: self._modules[id(item)]
            for key, item in attributes.items()
            if id(item) in self._modules
        }
        if not replaced:
            return self.of(value, place)
        changed = copy.copy(value)
        vars(changed).update(replaced)
        return changed

    def _function(self, function: FunctionType, place: str) -> FunctionType:
        contents = _contents(function)
        cells = [self._holder(content, place) for content in contents]
        variables = function.__globals__
        replaced: dict[str, Any] = {}
        for name in names_in(function.__code__) & variables.keys():
            if id(variables[name]) in self._modules:
                replaced[name] = self._modules[id(variables[name])]
            elif id(variables[name]) in self._parameters:
                raise LiveParameter(self._parameters[id(variables[name])], place)
        same_cells = all(a is b for a, b in zip(cells, contents, strict=True))
        attributes = self._mapping(vars(function), place)
        if same_cells and not replaced and attributes is vars(function):
            return function
        closure = tuple(_cell(cell, content) for cell, content in _filled(function, cells))
        rebuilt = FunctionType(
            function.__code__,
            variables | replaced if replaced else variables,
            function.__name__,
            function.__defaults__,
            closure if function.__closure__ is not None else None,
        )
        rebuilt.__kwdefaults__ = function.__kwdefaults__
        rebuilt.__dict__.update(attributes)
        return rebuilt


_EMPTY = object()


def _contents(function: FunctionType) -> list[object]:
    contents: list[object] = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # the variable is not assigned yet
            contents.append(_EMPTY)
    return contents


def _filled(function: FunctionType, contents: list[Any]) -> list[tuple[CellType, Any]]:
    return list(zip(function.__closure__ or (), contents, strict=True))


def _cell(original: CellType, content: object) -> CellType:
    """The original where its content is the same, so that later assignments are seen."""
    if content is _EMPTY or original.cell_contents is content:
        return original
    return CellType(content)
