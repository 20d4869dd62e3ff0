"""Objects that are named on the command line as `my_file.py:name`.

The file is run as a module, and the name is looked up in it.
"""

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
    """The query that a reference names."""
    from backtrail.queries import Query

    return _find(reference, Query)  # type: ignore[type-abstract]


def rows_at(reference: str) -> "Rows":
    """The data set that a reference names."""
    from backtrail.task.task import Rows

    return _find(reference, Rows, called="data set")  # type: ignore[type-abstract]


def in_same_file(reference: str, name: str) -> str:
    """A reference to another name in the same file.

    >>> in_same_file("my_file.py:task", "queries")
    'my_file.py:queries'
    """
    path, _, _ = reference.rpartition(":")
    return f"{path}:{name}"


def _find(reference: str, kind: type[Kind], *, called: str | None = None) -> Kind:
    """Load the file of a reference and return the named object, or what the named function returns.

    Args:
        reference: File and name, as FILE.py:NAME.
        kind: What the object must be an instance of.
        called: Name of that kind in error messages; by default its class name.

    Raises:
        BadReference: It is not FILE.py:NAME, or there is no such file.
        NotInFile: The file has no such name, or another kind of object under it.
    """
    file, _, name = reference.rpartition(":")
    if not file or not name:
        raise BadReference(reference)
    path = Path(file)
    if not path.is_file():
        raise BadReference(reference, path)
    module = _load(path.resolve())
    value = getattr(module, name, None)
    if callable(value) and not _is_instance(value, kind):
        value = _call_user_code(path, value)
    if not _is_instance(value, kind):
        raise NotInFile(
            reference,
            called or kind.__name__,
            found=type(value).__name__,
            there=_names_of_kind(module, kind),
        )
    return value


# Cached, so that the task and the queries of one file come from one run of it.
@cache
def _load(path: Path) -> ModuleType:
    name = f"backtrail_file_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses and pickles look their module up by name.
    sys.modules[name] = module
    # The file may import its neighbours, as a script does.
    sys.path.insert(0, str(path.parent))
    _call_user_code(path, spec.loader.exec_module, module)
    return module


def _call_user_code(path: Path, function: Callable[..., object], *arguments: object) -> object:
    """Call a function of the user's file, and report its errors with the line in that file.

    Raises:
        BacktrailError: As the function raised it.
        BrokenFile: In place of any other error.
    """
    try:
        return function(*arguments)
    except BacktrailError:
        raise
    except Exception as error:
        raise BrokenFile(path, _failing_line(path, error), error) from error


def _failing_line(path: Path, error: Exception) -> int | None:
    """The innermost line of the user's file that an error came from; None if it has none."""
    # A syntax error is raised before the file runs, so it is in no frame.
    if isinstance(error, SyntaxError):
        return error.lineno
    line: int | None = None
    for frame in extract_tb(error.__traceback__):
        if Path(frame.filename).name == path.name:
            line = frame.lineno
    return line


def _names_of_kind(module: ModuleType, kind: type) -> list[str]:
    """Names in a file that hold such an object, or a function annotated to return one."""
    names: list[str] = []
    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        if _is_instance(value, kind) or _returns(value, kind):
            names.append(name)
    return names


def _is_instance(value: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a value is of a kind; classes and strings are not data sets, though they look it."""
    # `Rows` is a protocol of __len__ and __getitem__, which strings and generic classes have.
    return isinstance(value, kind) and not isinstance(value, type | str)


def _returns(value: object, kind: type) -> bool:
    return isfunction(value) and kind.__name__ in str(value.__annotations__.get("return"))
