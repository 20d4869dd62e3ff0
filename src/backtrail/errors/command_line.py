"""Errors in the arguments of the command line."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, did_you_mean, join_items


class BadReference(BacktrailError, ValueError):
    """An object is not named as file and name, or the file does not exist."""

    def __init__(self, reference: str, missing: Path | None = None) -> None:
        if missing is None:
            problem = f"Invalid reference {reference!r}: expected a Python file and a name in it"
        else:
            problem = f"Invalid reference {reference!r}: there is no file {missing}"
        self.args = (f"{problem}. Write FILE.py:NAME, for example my_file.py:task.",)


class BrokenFile(BacktrailError, RuntimeError):
    """A file given on the command line raises an exception while it is read."""

    def __init__(self, path: Path, line: int | None, error: Exception) -> None:
        where = f"{path}" if line is None else f"{path}, line {line}"
        self.args = (
            f"{where}: {type(error).__name__}: {error}. Reading the file runs it: put the training "
            "itself under `if __name__ == '__main__':`.",
        )


class NotInFile(BacktrailError, KeyError):
    """A file does not hold the named object, or holds one of another type."""

    def __init__(self, reference: str, wanted: str, *, found: str, there: Sequence[str]) -> None:
        path, _, name = reference.rpartition(":")
        if found == "NoneType":
            problem = f"{path} has no {name!r}"
        else:
            problem = f"{path} has {name!r}, which is a {found}, not a {wanted}"
        others = f"There is no {wanted} in this file"
        if there:
            others = f"A {wanted} in this file: {join_items(there)}"
        self.args = (f"{problem}. {others}.{did_you_mean(name, there)}",)


class OtherRun(BacktrailError, ValueError):
    """An influence, or a folder of re-runs, belongs to another run than the one given."""

    def __init__(self, influence: Path | None, made_from: str, *, run: Path, given: str) -> None:
        what = "This influence" if influence is None else str(influence)
        self.args = (
            f"{what} belongs to the run with id {made_from}, but {run} has id {given}. Open the "
            "run that it was computed from.",
        )
