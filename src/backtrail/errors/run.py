"""What can go wrong with the folder of a run, and with the task that is said to explain it."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items


class NotARun(BacktrailError):
    """A folder holds no recording."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"{folder} holds no run (no manifest.json). Record one with backtrail.Recorder({str(folder)!r}, ...).",
        )


class RunExists(BacktrailError):
    """A recorder was pointed at a folder that already holds a run."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"{folder} already holds a run, and nothing recorded is ever overwritten. Choose another folder.",
        )


class WrongFormat(BacktrailError):
    """A folder was written in a layout that this version does not read."""

    def __init__(self, path: Path, found: object, wanted: int) -> None:
        self.args = (
            f"{path} has format {found}; this version of backtrail reads format {wanted}.",
        )


class DamagedFile(BacktrailError):
    """A file of a run is missing or is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        self.args = (
            f"{path} cannot be used: {what}. Restore the file from a copy, or record the run again.",
        )


class EmptyRun(BacktrailError):
    """A run has no whole step."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"The run in {folder} has no whole step: the training ended before its first update.",
        )


class WrongModel(BacktrailError):
    """The task's model is not the one that was recorded."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.args = ("The task's model is not the recorded one: " + "; ".join(problems) + ".",)


class WrongData(BacktrailError):
    """The task's data set is not the one that was recorded."""

    def __init__(self, what: str) -> None:
        self.args = (
            f"The task's data set is not the recorded one: {what}. Give the task the data set of the training, rows in "
            "the same order; if rows are augmented at random, record with keep_batches=True.",
        )


class BadBatch(BacktrailError):
    """A batch cannot be stored."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"keep_batches=True stores tuples, lists and dicts of tensors and plain values; this batch holds a {kind}. "
            "Convert it in the collate function.",
        )


class NoSuchState(BacktrailError):
    """A state or step was asked for that the run does not have."""

    def __init__(self, number: int, last: int, what: str) -> None:
        self.args = (f"There is no {what} {number}: the run has {what}s 0 to {last}.",)


class MissingState(BacktrailError):
    """No checkpoint was kept at a state."""

    def __init__(self, number: int, kept: Sequence[int]) -> None:
        before = max(state for state in kept if state <= number)
        self.args = (
            f"State {number} was not kept; kept: {join_items(kept)}. "
            f"run.state({number}, replay=True) replays it from state {before}.",
        )


class ReplayMismatch(BacktrailError):
    """A replayed step differs from the recorded one."""

    def __init__(self, step: int, what: str, off: tuple[float, float]) -> None:
        self.args = (
            f"Step {step} does not replay: {what} differs by {off[0]:.2g} (relative), tolerance {off[1]:.2g}. "
            "Usual causes: another data set or data order, rows augmented at random (record with keep_batches=True), "
            "another version or device of torch. run.verify(tolerance=...) sets the tolerance.",
        )
