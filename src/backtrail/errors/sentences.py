"""The base class of all errors, and the pieces of their sentences.

An error's class builds its sentence: what happened, with values; where; what to type next.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches

LONGEST = 80  # characters of a value that are shown


class BacktrailError(Exception):
    """Base class of all errors of this library.

    The sentence says what happened, with values, and what to type next. Each subclass also derives
    from the built-in exception that fits (`ValueError`, `KeyError`, `FileNotFoundError`, ...), so
    either can be caught:

    >>> import backtrail
    >>> try:
    ...     backtrail.open_influence("missing")
    ... except FileNotFoundError as error:
    ...     print(error)
    missing holds no influence: no such folder. Give the folder that attribute(out=...) wrote.
    """

    def __str__(self) -> str:
        """The sentence; `KeyError` would put quotation marks around it."""
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the finished sentence, whatever the constructor takes."""
        return _rebuilt, (type(self), self.args)


def _rebuilt(kind: type[BacktrailError], args: tuple[object, ...]) -> BacktrailError:
    error = kind.__new__(kind)
    error.args = args
    return error


class MissingExtra(BacktrailError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self.args = (
            f"Module {module!r} is not installed, and this function needs it: "
            f"pip install 'backtrail[{extra}]'.",
        )


def join_items(items: Sequence[object], most: int = 20) -> str:
    """Join items for a message, with the middle left out where there are many.

    >>> join_items([3, 5, 8]), join_items(range(100), most=4)
    ('3, 5, 8', '0, 1, ... (96 more) ..., 98, 99')
    """
    texts = [str(item) for item in items]
    if len(texts) > most:
        half = most // 2
        left_out = len(texts) - 2 * half
        texts = [*texts[:half], f"... ({left_out} more) ...", *texts[len(texts) - half :]]
    return ", ".join(texts)


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "step"), count_of(2, "query"), count_of(0, "state")
    ('1 step', '2 queries', '0 states')
    """
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {plural}"


def shown(value: object) -> str:
    """A value in one short line: its `repr`, or its type where that is long.

    >>> shown(0), shown("dit"), shown(list(range(99)))
    ('0', "'dit'", '<list>')
    """
    text = repr(value)
    if len(text) > LONGEST or "\n" in text:
        return f"<{type(value).__name__}>"
    return text


def did_you_mean(given: object, known: Sequence[str]) -> str:
    """A sentence with the known name that is spelled most alike; empty if there is none.

    >>> did_you_mean("dvee", ["dve", "dit"])
    " Did you mean 'dve'?"
    """
    near = get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def quoted_in(text: str) -> list[str]:
    """Words in quotation marks.

    >>> quoted_in("'keep' or 'renormalize'")
    ['keep', 'renormalize']
    """
    return re.findall(r"'([^']*)'", text)
