"""Errors of Data Value Embedding."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from backtrail.errors.influence import differing
from backtrail.errors.sentences import BacktrailError, join_items


class EmbeddingGrew(BacktrailError, RuntimeError):
    """The recursion of an embedding is not stable."""

    def __init__(self, step: int, block: str, growth: float) -> None:
        size = "are not finite"
        if isfinite(growth):
            size = f"are {growth:.2g} times as large as the step's own update"
        self.args = (
            f"At step {step} the embeddings of {block!r} {size}: the recursion is unstable where "
            "learning rate x curvature > 2 in later steps. Use damping=0.5 or more, fisher='true' "
            "instead of 'empirical', projection='orthonormal', a smaller rank, or train with a "
            "smaller learning rate.",
        )


class DifferentEmbeddings(BacktrailError, ValueError):
    """A folder holds embeddings with other settings, which this call cannot resume."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        self.args = (
            f"{path} holds embeddings with other settings ({differing(differences)}). Use the same "
            "settings to resume them, choose another folder, or delete this one.",
        )


class NoDraw(BacktrailError, ValueError):
    """The true Fisher matrix needs labels sampled from the model."""

    def __init__(self) -> None:
        self.args = (
            "fisher='true' samples labels from the model, and this task has no `draw` function. "
            "Give Task(draw=...) a function of outputs, batch and generator that samples labels "
            "and returns the losses [slot] with them, as backtrail.classification, regression and "
            "language_model do; or use backtrail.DataValueEmbedding(fisher='empirical').",
        )


class NotCut(BacktrailError, ValueError):
    """A batch cannot be reduced to some of its samples."""

    def __init__(self, shape: tuple[int, ...], rows: int) -> None:
        self.args = (
            "DataValueEmbedding(drawn=...) below 1 takes some samples out of every batch, but a "
            f"tensor of shape {list(shape)} in this batch does not have the {rows} samples on its "
            "first axis. Use drawn=1.",
        )


class NotCaptured(BacktrailError, RuntimeError):
    """Per-sample gradients cannot be captured from the training loop's own passes."""

    def __init__(self, step: int, reason: str) -> None:
        self.args = (
            f"Step {step}: Recorder(capture=...) cannot compute per-sample gradients: {reason}. "
            "It needs a model that is called as a whole, eagerly and once per batch, without "
            "BatchNorm in train mode, recurrent layers or a scaled loss. Record without capture=; "
            "embed(run) computes the same afterwards.",
        )


class NotEmbedded(BacktrailError, KeyError):
    """Embeddings were not built for a state."""

    def __init__(self, states: Sequence[int], observed: Sequence[int]) -> None:
        plural = "s" if len(states) > 1 else ""
        self.args = (
            f"These embeddings were not built for state{plural} {join_items(states, most=6)}; "
            f"available states: {join_items(observed)}. Use one of these, or call embed(run, "
            "observed_at=...) with the state.",
        )


class NotEmbeddings(BacktrailError, FileNotFoundError):
    """A folder does not hold embeddings."""

    def __init__(self, path: Path, reason: str) -> None:
        self.args = (
            f"{path} holds no embeddings: {reason}. Give the folder that embed(run, out=...) "
            "wrote.",
        )


class UnfinishedEmbeddings(BacktrailError, RuntimeError):
    """An embedding was interrupted."""

    def __init__(self, path: Path) -> None:
        self.args = (
            f"The embeddings in {path} are unfinished. Call embed again with the same settings to "
            "resume.",
        )


class DamagedEmbeddings(BacktrailError, RuntimeError):
    """A file of embeddings is missing, truncated or changed."""

    def __init__(self, path: Path | None, reason: str) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (f"The embeddings {where} are damaged: {reason}. Delete them and embed again.",)


class EmbeddedElsewhere(BacktrailError, ValueError):
    """Embeddings belong to another run than the one given."""

    def __init__(self, path: Path | None, made_from: str, given: str) -> None:
        where = "These embeddings" if path is None else f"The embeddings in {path}"
        self.args = (
            f"{where} belong to the run with id {made_from}, but the given run has id {given}. "
            "Open the run that they were computed from.",
        )
