"""What every error is made of: a class that builds its own sentence, what happened, with values, what to do."""

from collections.abc import Sequence


class BacktrailError(Exception):
    """What every error of this library derives from."""

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes as the finished sentence, whatever the constructor takes."""
        return _rebuilt, (type(self), self.args)


def _rebuilt(kind: type[BacktrailError], args: tuple[object, ...]) -> BacktrailError:
    error = kind.__new__(kind)
    error.args = args
    return error


def join_items(items: Sequence[object], most: int = 20) -> str:
    """Join items for a message, with the middle left out where there are many.

    >>> join_items([3, 5, 8]), join_items(range(100), most=4)
    ('3, 5, 8', '0, 1, ... (96 more) ..., 98, 99')
    """
    texts = [str(item) for item in items]
    if len(texts) > most:
        half = most // 2
        texts = [
            *texts[:half],
            f"... ({len(texts) - 2 * half} more) ...",
            *texts[len(texts) - half :],
        ]
    return ", ".join(texts)


class MissingExtra(BacktrailError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self.args = (f"This needs {module!r}: pip install 'backtrail[{extra}]'.",)
