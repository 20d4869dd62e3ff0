"""What can go wrong with the embeddings of a training."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items


class EmbeddingGrew(BacktrailError):
    """The recursion of an embedding is not stable."""

    def __init__(self, step: int, block: str, growth: float) -> None:
        told = (
            f"are {growth:.2g} times what the step itself moved"
            if isfinite(growth)
            else "are not finite"
        )
        self.args = (
            f"At step {step} the embeddings of {block!r} {told}: rate times "
            "curvature is above 2 in later steps, and their product explodes. Use damping=0.5 or more, fisher='true' "
            "instead of 'empirical', projection='orthonormal', a smaller rank; or train with a smaller learning rate.",
        )


class DifferentEmbeddings(BacktrailError):
    """An embedding cannot go on in a folder that was begun with other arguments."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        told = "; ".join(
            f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences.items()
        )
        self.args = (
            f"{path} holds other embeddings ({told}). Use the same arguments to go on, or another "
            "folder, or delete this one.",
        )


class NoDraw(BacktrailError):
    """The true Fisher matrix needs labels drawn from the model."""

    def __init__(self) -> None:
        self.args = (
            "fisher='true' draws labels from the model, and this task does not say how. Give Task(draw=...): a "
            "function of outputs, batch and generator that draws labels by the outputs and returns the losses [slot] "
            "with them; backtrail.classification, regression and language_model have one. Or embed with "
            "backtrail.DataValueEmbedding(fisher='empirical').",
        )


class NotCut(BacktrailError):
    """Some samples cannot be taken out of a batch."""

    def __init__(self, shape: tuple[int, ...], rows: int) -> None:
        self.args = (
            "DataValueEmbedding(drawn=...) below 1 takes some samples out of every batch, and a tensor in this one, "
            f"of shape {list(shape)}, does not have its {rows} samples along the first axis. Use drawn=1.",
        )


class NotCaptured(BacktrailError):
    """Rows cannot be captured from the loop's own passes."""

    def __init__(self, step: int, reason: str) -> None:
        self.args = (
            f"Step {step}: what Recorder(capture=...) saw of the loop does not tell the samples' gradients: {reason}. "
            "It needs a model that is called as a whole, eagerly and once per batch, without BatchNorm in train mode, "
            "recurrent layers or a scaled loss. Record without capture=; embed(run) finds the same afterwards.",
        )


class NotEmbedded(BacktrailError):
    """Embeddings do not lead to a state."""

    def __init__(self, states: Sequence[int], observed: Sequence[int]) -> None:
        self.args = (
            f"These embeddings do not lead to {join_items(states, most=6)}; "
            f"they lead to the states {join_items(observed)}. "
            "Use one of those, or embed again with embed(run, observed_at=...).",
        )


class NotEmbeddings(BacktrailError):
    """A folder does not hold embeddings."""

    def __init__(self, path: Path, reason: str) -> None:
        self.args = (
            f"{path} holds no embeddings: {reason}. Give the folder that embed(run, out=...) wrote.",
        )


class UnfinishedEmbeddings(BacktrailError):
    """An embedding was interrupted."""

    def __init__(self, path: Path) -> None:
        self.args = (
            f"The embeddings in {path} are unfinished. Call embed again with the same arguments to go on.",
        )


class DamagedEmbeddings(BacktrailError):
    """A file of some embeddings is missing, cut short or changed."""

    def __init__(self, path: Path | None, reason: str) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (f"The embeddings {where} are damaged: {reason}. Delete them and embed again.",)


class EmbeddedElsewhere(BacktrailError):
    """Embeddings are to be read with a run that they were not made from."""

    def __init__(self, path: Path | None, made_from: str, given: str) -> None:
        where = "These embeddings" if path is None else f"The embeddings in {path}"
        self.args = (
            f"{where} were made from the run {made_from}, and this is the run {given}. Open their own run.",
        )
