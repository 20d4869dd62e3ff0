"""Errors of the folder of a run, and of the task that is opened with it."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items


class NotARun(BacktrailError, FileNotFoundError):
    """A folder holds no recording."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"{folder} holds no run (no manifest.json). Record one with "
            f"backtrail.Recorder({str(folder)!r}, ...).",
        )


class RunExists(BacktrailError, FileExistsError):
    """The folder for a new recording already holds a run."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"{folder} already holds a run, and runs are never overwritten. Choose another folder.",
        )


class WrongFormat(BacktrailError, ValueError):
    """A folder has a format that this version cannot read."""

    def __init__(
        self, path: Path, found: object, wanted: object, *, remedy: str = "record the run again"
    ) -> None:
        self.args = (
            f"{path} has format {found}; this version of backtrail reads format {wanted}. Use the "
            f"version that wrote it, or {remedy}.",
        )


class DamagedFile(BacktrailError, RuntimeError):
    """A file of a run is missing or was changed."""

    def __init__(self, path: Path, what: str) -> None:
        self.args = (
            f"{path} cannot be used: {what}. Restore the file from a copy, or record the run "
            "again.",
        )


class EmptyRun(BacktrailError, ValueError):
    """A run has no complete step."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"The run in {folder} has no complete step: the training ended before its first "
            "update. Record the run again.",
        )


class WrongModel(BacktrailError, ValueError):
    """The task's model is not the recorded one."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.args = (
            f"The task's model is not the recorded one: {'; '.join(problems)}. Give the task the "
            "model of the training.",
        )


class WrongData(BacktrailError, ValueError):
    """The task's data set is not the recorded one."""

    def __init__(self, what: str) -> None:
        self.args = (
            f"The task's data set is not the recorded one: {what}. Give the task the data set of "
            "the training, rows in the same order; with random augmentation of rows, record with "
            "keep_batches=True.",
        )


class FedOfAnotherForm(BacktrailError, ValueError):
    """Rows of the data set are not what the task's loss takes."""

    def __init__(self, problem: str) -> None:
        self.args = (
            "This reads rows of the data set and evaluates the task's loss on them, but the model "
            "was fed batches of another form (recorder.fed), and the loss or predict cannot take "
            f"rows as they are: {problem}. Use backtrail.DIT() with a backtrail.Custom query, "
            "which read the stored batches alone; or let loss and predict of the task accept rows "
            "as well (for example with a weight of 1 where a batch has none).",
        )


class BadBatch(BacktrailError, TypeError):
    """A batch cannot be stored."""

    def __init__(self, kind: str) -> None:
        self.args = (
            "keep_batches=True stores tuples, lists and dicts of tensors and plain values; this "
            f"batch contains a {kind}. Convert it in the collate function.",
        )


class NoSuchState(BacktrailError, KeyError):
    """A state or step that the run does not have."""

    def __init__(self, number: int, last: int, what: str) -> None:
        self.args = (f"There is no {what} {number}: the run has {what}s 0 to {last}.",)


class MissingState(BacktrailError, KeyError):
    """No checkpoint was stored for a state."""

    def __init__(self, number: int, kept: Sequence[int]) -> None:
        before = max(state for state in kept if state <= number)
        self.args = (
            f"State {number} was not stored; stored states: {join_items(kept)}. "
            f"run.state({number}, replay=True) computes it from state {before}.",
        )


class ReplayMismatch(BacktrailError, RuntimeError):
    """A replayed step differs from the recorded one."""

    def __init__(self, step: int, what: str, off: tuple[float, float]) -> None:
        found, tolerance = off
        self.args = (
            f"Step {step} replays differently: {what} differs by {found:.2g} from the recorded one "
            f"(relative), tolerance {tolerance:.2g}. Usual causes: another data set or data order; "
            "another loss, reduction, penalty or model than the training's; random augmentation of "
            "rows (record with keep_batches=True); Python or NumPy random numbers in loss, predict "
            "or the model; memory of their own (a counter, a running mean, a carried hidden state) "
            "or a schedule kept outside of the batch (put its value into the batch, with "
            "recorder.fed(batch)); hooks, or code in the loop, that change gradients; an optimizer "
            "state that was reset or loaded; training on several processes; another version or "
            "device of torch. run.verify(tolerance=...) sets the tolerance.",
        )
