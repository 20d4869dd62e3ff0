"""Conversions of arguments: one function for each kind, used by every public function and class.

Each takes the name of the argument and its value, and returns the value as a plain Python object,
or raises `BadSetting` with the name, the value and what is expected. Whole numbers may come from
Python, numpy or torch. A bool is never a number, a float is never a whole number, and a string is
never a sequence of its letters.

Nothing here imports torch before a tensor or a dtype has to be recognised, so that reading an
influence stays fast.
"""

import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from backtrail.errors import BadSetting, ImpossibleWindow

if TYPE_CHECKING:
    import torch

Kind = TypeVar("Kind")
# Fits the seeds of numpy and of torch.
LARGEST_SEED = 2**63 - 1


def whole(
    name: str,
    value: object,
    *,
    least: int | None = None,
    most: int | None = None,
    expected: str | None = None,
) -> int:
    """A whole number within bounds.

    >>> whole("k", np.int64(7), least=1)
    7

    Args:
        name: Name of the argument.
        value: What was given.
        least: The smallest value that is allowed; None for any.
        most: The largest value that is allowed; None for any.
        expected: What the error asks for, in place of the bounds.

    Raises:
        BadSetting: It is something else.
    """
    number = as_whole(value)
    too_small = number is not None and least is not None and number < least
    too_large = number is not None and most is not None and number > most
    if number is None or too_small or too_large:
        raise BadSetting(name, value, expected or _whole_within(least, most))
    return number


def _whole_within(least: int | None, most: int | None) -> str:
    names = {None: "a whole number", 0: "a non-negative integer", 1: "a positive integer"}
    if most is None:
        return names.get(least) or f"an integer of at least {least}"
    return (
        f"an integer of at most {most}" if least is None else f"an integer from {least} to {most}"
    )


def as_whole(value: object) -> int | None:
    """A whole number of Python, numpy or torch as an int; None for anything else.

    >>> as_whole(np.array(3)), as_whole(True), as_whole(3.0), as_whole("3")
    (3, None, None, None)
    """
    # A bool is an index to Python, and so is a tensor with one entry, of whatever shape.
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or getattr(value, "shape", ()) != ():
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def positive_or_none(name: str, value: object) -> int | None:
    """A positive whole number, or None.

    >>> positive_or_none("batch", None), positive_or_none("batch", 8)
    (None, 8)

    Raises:
        BadSetting: It is something else.
    """
    if value is None:
        return None
    return whole(name, value, least=1, expected="a positive integer or None")


def seed(name: str, value: object) -> int:
    """A seed of random numbers.

    Raises:
        BadSetting: It is not a whole number from 0 to 2^63 - 1.
    """
    return whole(name, value, least=0, most=LARGEST_SEED)


def real(
    name: str, value: object, expected: str, valid: Callable[[float], bool] = lambda _: True
) -> float:
    """A finite real number that fulfils a condition.

    >>> real("width", 2, "a positive number", lambda width: width > 0)
    2.0

    Args:
        name: Name of the argument.
        value: What was given.
        expected: What the error asks for.
        valid: The condition.

    Raises:
        BadSetting: It is something else, NaN, or infinite.
    """
    number = as_real(value)
    if number is None or not math.isfinite(number) or not valid(number):
        raise BadSetting(name, value, expected)
    return number


def as_real(value: object) -> float | None:
    """A real number of Python, numpy or torch as a float; None for anything else.

    >>> as_real(np.float32(0.5)), as_real(2), as_real(True), as_real("2")
    (0.5, 2.0, None, None)
    """
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    # `float` reads strings, and numpy's complex numbers lose their imaginary part.
    is_other = isinstance(value, (str, bytes, bytearray)) or "complex" in str(
        getattr(value, "dtype", "")
    )
    if is_bool or is_other or getattr(value, "shape", ()) != ():
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def positive(name: str, value: object, expected: str = "a positive number") -> float:
    """A finite number above 0.

    Raises:
        BadSetting: It is something else.
    """
    return real(name, value, expected, lambda number: number > 0)


def tolerance(name: str, value: object) -> float | None:
    """A relative difference above 0; None lets the caller choose.

    Raises:
        BadSetting: It is something else.
    """
    return None if value is None else positive(name, value, "a positive number or None")


def flag(name: str, value: object) -> bool:
    """True or False.

    Raises:
        BadSetting: It is something else, such as a number or a word.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise BadSetting(name, value, "True or False")
    return bool(value)


def choice(name: str, value: object, options: Iterable[str], also: str = "") -> str:
    """One of several words.

    >>> choice("order", "harmful", ("harmful", "helpful"))
    'harmful'

    Args:
        name: Name of the argument.
        value: What was given.
        options: The words.
        also: What the caller allows besides, for the error.

    Raises:
        BadSetting: It is none of them.
    """
    words = tuple(options)
    if not isinstance(value, str) or value not in words:
        quoted = [repr(word) for word in words]
        if also:
            raise BadSetting(name, value, f"{', '.join(quoted)} or {also}")
        listed = " or ".join(quoted) if len(quoted) < 3 else ", ".join(quoted)
        raise BadSetting(name, value, listed)
    return value


def text(name: str, value: object, expected: str = "a string that is not empty") -> str:
    """A string that is not empty.

    Raises:
        BadSetting: It is something else.
    """
    if not isinstance(value, str) or not value:
        raise BadSetting(name, value, expected)
    return value


def instance(name: str, value: object, kind: type[Kind], expected: str) -> Kind:
    """An object of a class.

    Raises:
        BadSetting: It is of another class.
    """
    if isinstance(value, type) or not isinstance(value, kind):
        raise BadSetting(name, value, expected)
    return value


def function(name: str, value: Kind, expected: str = "a function") -> Kind:
    """Something that can be called.

    Raises:
        BadSetting: It cannot.
    """
    if not callable(value):
        raise BadSetting(name, value, expected)
    return value


def whole_numbers(
    name: str,
    value: object,
    *,
    least: int | None = 0,
    most: int | None = None,
    expected: str = "one or more whole numbers",
    empty: bool = False,
) -> list[int]:
    """Several whole numbers, in their order.

    Any container of Python will do, a numpy array or a tensor with one axis, or a column of a
    table. A mask of true and false is not a list of numbers.

    >>> whole_numbers("samples", np.array([5, 2])), whole_numbers("samples", range(2))
    ([5, 2], [0, 1])

    Args:
        name: Name of the argument.
        value: What was given.
        least: The smallest value that is allowed; None for any.
        most: The largest value that is allowed; None for any.
        expected: What the error asks for.
        empty: Whether there may be none.

    Raises:
        BadSetting: It is something else, or one of them is.
    """
    found = [as_whole(item) for item in items(name, value, expected)]
    numbers: list[int] = []
    for number in found:
        too_small = number is not None and least is not None and number < least
        too_large = number is not None and most is not None and number > most
        if number is None or too_small or too_large:
            raise BadSetting(name, value, expected)
        numbers.append(number)
    if not numbers and not empty:
        raise BadSetting(name, value, expected)
    return numbers


def items(name: str, value: object, expected: str) -> list[object]:
    """The entries of a container along its first axis.

    Raises:
        BadSetting: It is a string, a mapping, a class, or no container.
    """
    is_other = isinstance(value, (str, bytes, bytearray, Mapping, type))
    if is_other or not isinstance(value, Iterable):
        raise BadSetting(name, value, expected)
    # Arrays and tensors as plain numbers, which is faster; without axes they are one number.
    listed = value.tolist() if hasattr(value, "tolist") else list(value)
    if not isinstance(listed, list):
        raise BadSetting(name, value, expected)
    return listed


def pair(name: str, value: object, expected: str) -> tuple[int, int]:
    """Two whole numbers.

    Raises:
        BadSetting: It is something else.
    """
    numbers = whole_numbers(name, value, least=None, expected=expected)
    if len(numbers) != 2:
        raise BadSetting(name, value, expected)
    first, second = numbers
    return first, second


def count_rows(name: str, value: object, expected: str) -> int:
    """Number of rows of a map-style data set, or of a list of rows.

    Raises:
        BadSetting: It is something else.
    """
    is_other = isinstance(value, (str, bytes, bytearray, Mapping, type))
    if is_other or not isinstance(value, Sized) or not hasattr(value, "__getitem__"):
        raise BadSetting(name, value, expected)
    try:
        return len(value)
    except TypeError:  # a tensor or an array without axes
        raise BadSetting(name, value, expected) from None


def step_range(name: str, value: object, steps: int) -> tuple[int, int]:
    """The steps [a, b) of a training, or a window between its states a and b.

    >>> step_range("steps", (0, np.int64(4)), 10)
    (0, 4)

    Raises:
        BadSetting: It is not two whole numbers.
        ImpossibleWindow: It is not 0 <= a <= b <= steps.
    """
    start, stop = pair(name, value, f"(a, b), two whole numbers with 0 <= a <= b <= {steps}")
    if not 0 <= start <= stop <= steps:
        raise ImpossibleWindow(start, stop, steps)
    return start, stop


def path(name: str, value: object) -> Path:
    """The path of a file or folder, which need not exist.

    Raises:
        BadSetting: It is no path, or no system could have such a file.
    """
    expected = "a path, as a string or a pathlib.Path"
    # `Path("")` is the current folder, which nobody means.
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise BadSetting(name, value, expected)
    given = os.fspath(value)
    if not isinstance(given, str):
        raise BadSetting(name, value, expected)
    try:
        Path(given).stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError):  # too long, or with a zero byte in it
        raise BadSetting(name, value, expected) from None
    return Path(given)


def path_or_none(name: str, value: object) -> Path | None:
    """The path of a file or folder, or None.

    Raises:
        BadSetting: It is something else.
    """
    return None if value is None else path(name, value)


def folder(name: str, value: object) -> Path:
    """The path of a folder that exists or can be created.

    Raises:
        BadSetting: It is no path, or a file is in the way.
    """
    given = path(name, value)
    for place in (given, *given.parents):
        if place.exists():
            if not place.is_dir():
                which = "this" if place == given else str(place)
                expected = f"a folder, which need not exist yet; {which} is a file"
                raise BadSetting(name, str(given), expected)
            break
    return given


def folder_or_none(name: str, value: object) -> Path | None:
    """The path of a folder that exists or can be created, or None.

    Raises:
        BadSetting: It is something else.
    """
    return None if value is None else folder(name, value)


def file(name: str, value: object, endings: Iterable[str] = ()) -> Path:
    """The path of a file that can be written, in a folder that exists.

    Args:
        name: Name of the argument.
        value: What was given.
        endings: How the name of the file may end; all endings where there are none.

    Raises:
        BadSetting: It is no path, a folder, in no folder, or has another ending.
    """
    given = path(name, value)
    allowed = tuple(endings)
    if allowed and given.suffix not in allowed:
        raise BadSetting(name, str(given), f"a file name that ends with {' or '.join(allowed)}")
    if given.is_dir() or not given.parent.is_dir():
        raise BadSetting(name, str(given), "a file in a folder that exists")
    return given


def precision(name: str, value: object) -> "torch.dtype | None":
    """A floating-point dtype of torch, or None.

    Raises:
        BadSetting: It is something else, such as an integer dtype or a dtype of numpy.
    """
    if value is None:
        return None
    expected = "torch.float64, float32, bfloat16, float16 or None"
    # Who has a dtype of torch has imported torch.
    loaded: Any = sys.modules.get("torch")
    names = ("float64", "float32", "bfloat16", "float16")
    allowed = [] if loaded is None else [getattr(loaded, name) for name in names]
    for dtype in allowed:
        if value is dtype:
            return cast("torch.dtype", dtype)
    raise BadSetting(name, value, expected)
