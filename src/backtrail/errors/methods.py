"""What can go wrong in an attribution, and in the check of one."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items


class BadSetting(BacktrailError):
    """A method was given a setting that it does not have."""

    def __init__(self, name: str, value: object, wanted: str) -> None:
        self.args = (f"{name}={value!r} is no setting; give {wanted}.",)


class CannotRenormalize(BacktrailError):
    """Renormalised denominators have no meaning for a run."""

    def __init__(self, why: str) -> None:
        self.args = (
            f"denominator='renormalize' does not fit this run: {why}. Use denominator='keep'.",
        )


class TooLittleMemory(BacktrailError):
    """A sweep does not fit."""

    def __init__(self, free: int, needed: int, rows: int) -> None:
        self.args = (
            f"A sweep with {rows} cotangents (queries x observed states) needs {needed / 2**20:.0f} MiB, and may use "
            f"{free / 2**20:.0f} MiB. Ask fewer queries or states at once, or allow more: memory=bytes.",
        )


class NoOutputs(BacktrailError):
    """Gauss-Newton curvature needs the model's outputs."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"GaussNewton bends the loss at the model's outputs, and finds no floating tensor in the {kind} that "
            "predict returned. Let predict return tensors (nested in tuples, lists or dicts), or use "
            "curvature=backtrail.Hessian().",
        )


class WithoutQueries(BacktrailError):
    """An influence is to be checked, and what was asked is not known."""

    def __init__(self, names: Sequence[str]) -> None:
        which = (
            f"the ones named {join_items(names, most=6)}"
            if names
            else "a backtrail.Loss, for example"
        )
        self.args = (
            "The checks ask the queries again; an influence from disk comes without them, and it has to be the same "
            f"ones. Give queries=, {which}.",
        )


class CoupledLoss(BacktrailError):
    """A loss that no sample has to itself cannot be taken apart."""

    def __init__(self) -> None:
        self.args = (
            "The loss of one sample depends on the outputs of another (a contrastive loss, or an average over the "
            "batch?), and embeddings need a gradient that is the sample's own. Use backtrail.DIT(), which does not, or "
            "give the task a loss of every row by itself.",
        )


class RowsNotReadable(BacktrailError):
    """A method reads rows by number, and the run's samples are ids."""

    def __init__(
        self, method: str, instead: str = "PerSampleRule backtrail.DIT or backtrail.TracIn"
    ) -> None:
        self.args = (
            f"{method} reads rows of the training set by number, and the samples of this run are ids. "
            f"{instead}, or record a run of a data set with row numbers.",
        )


class NoCheckpoints(BacktrailError):
    """There are no checkpoints to look at."""

    def __init__(self, problem: str) -> None:
        self.args = (
            f"There are no checkpoints to use: {problem}. Give (step, state_dict, lr) for each, or a folder of files "
            "like step500.pt with lr=.",
        )


class BadCheckpoint(BacktrailError):
    """A checkpoint is not one of this training."""

    def __init__(self, place: str, problem: str) -> None:
        self.args = (f"{place} is no checkpoint of this training: {problem}.",)


class DamagedBank(BacktrailError):
    """A file of a bank of re-runs is not what was written."""

    def __init__(self, path: Path, why: str) -> None:
        self.args = (
            f"{path} is no file of a bank of re-runs ({why}). Give bank= a folder of its own; if this is it, delete "
            "the file, and its re-runs are made again.",
        )
