"""Objects named on the command line as `my_file.py:name`: the file is run, and the name looked up in it."""

import sys
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isfunction
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from backtrail.errors import BacktrailError, BadReference, BrokenFile, NotInFile

if TYPE_CHECKING:
    from backtrail.queries import Query
    from backtrail.task.task import Rows, Task

Kind = TypeVar("Kind")


def task_at(reference: str) -> "Task":
    """The task that a reference names."""
    from backtrail.task.task import Task

    return _find(reference, Task)


def queries_at(reference: str) -> "Query":
    """The queries that a reference names."""
    from backtrail.queries import Query

    return _find(reference, Query)  # type: ignore[type-abstract]


def rows_at(reference: str) -> "Rows":
    """The data set that a reference names."""
    from backtrail.task.task import Rows

    return _find(reference, Rows, called="data set")  # type: ignore[type-abstract]


def beside(reference: str, name: str) -> str:
    """Another name in the same file.

    >>> beside("my_file.py:task", "queries")
    'my_file.py:queries'
    """
    return f"{reference.rpartition(':')[0]}:{name}"


def _find(reference: str, kind: type[Kind], *, called: str | None = None) -> Kind:
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise BadReference(reference)
    path = Path(place)
    if not path.is_file():
        raise BadReference(reference, path)
    module = _load(path.resolve())
    found = getattr(module, name, None)
    # A function that makes the object is as good as the object.
    if callable(found) and not _is(found, kind):
        found = _running(path, found)
    if not _is(found, kind):
        wanted = called or kind.__name__
        raise NotInFile(reference, wanted, found=type(found).__name__, there=_there(module, kind))
    return found


@cache  # the task and the queries of one file are made from one run of it
def _load(path: Path) -> ModuleType:
    name = f"backtrail_file_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up by name
    sys.path.insert(0, str(path.parent))
    _running(path, spec.loader.exec_module, module)
    return module


def _running(path: Path, function: Callable[..., object], *arguments: object) -> object:
    """Call something of the user's file; what goes wrong in it is told with its line.

    Raises:
        BacktrailError: as it is.
        BrokenFile: for anything else.
    """
    try:
        return function(*arguments)
    except BacktrailError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in extract_tb(error.__traceback__)
            if Path(frame.filename).name == path.name
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise BrokenFile(path, line, error) from error


def _there(module: ModuleType, kind: type) -> list[str]:
    """Names of a file that hold what is wanted, or a function that says that it makes it."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    return [name for name, value in own.items() if _is(value, kind) or _makes(value, kind)]


def _is(value: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """A class or a string has the methods of a data set without being one."""
    return isinstance(value, kind) and not isinstance(value, type | str)


def _makes(value: object, kind: type) -> bool:
    return isfunction(value) and kind.__name__ in str(value.__annotations__.get("return"))
