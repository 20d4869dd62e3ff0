"""What can go wrong in what the command line is given."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items


class BadReference(BacktrailError):
    """An object is not named as file and name, or its file is not there."""

    def __init__(self, reference: str, missing: Path | None = None) -> None:
        problem = (
            f"{reference!r} does not name a Python file and something in it"
            if missing is None
            else ""
        )
        self.args = (
            f"{problem or f'There is no file {missing}'}. Write FILE.py:NAME, for example my_file.py:task.",
        )


class BrokenFile(BacktrailError):
    """A file of the user's fails while it is read."""

    def __init__(self, path: Path, line: int | None, error: Exception) -> None:
        where = f"{path}" if line is None else f"{path}, line {line}"
        self.args = (
            f"{where}: {type(error).__name__}: {error}. The file is run to read it: keep the training itself under "
            "if __name__ == '__main__'.",
        )


class NotInFile(BacktrailError):
    """A file does not hold what was named, or holds it as something else."""

    def __init__(self, reference: str, wanted: str, *, found: str, there: Sequence[str]) -> None:
        path, _, name = reference.rpartition(":")
        problem = (
            f"has no {name!r}"
            if found == "NoneType"
            else f"has {name!r}, which is a {found}, not a {wanted}"
        )
        others = (
            f"A {wanted} there: {join_items(there)}" if there else f"There is no {wanted} in it"
        )
        self.args = (f"{path} {problem}. {others}.",)


class OtherRun(BacktrailError):
    """An influence is to be checked against a run that it was not made from."""

    def __init__(self, influence: Path | None, made_from: str, *, run: Path, given: str) -> None:
        self.args = (
            f"{influence or 'This influence'} was made from the run {made_from}, and {run} is the run {given}. "
            "Give the folder of its own run.",
        )
