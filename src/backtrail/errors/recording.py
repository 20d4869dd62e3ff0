"""What can go wrong beside a training loop."""

from collections.abc import Sequence

from backtrail.errors.sentences import BacktrailError, join_items


class UnwatchableLoader(BacktrailError):
    """A loader's batches could not be read again."""

    def __init__(self, what: str, cure: str) -> None:
        self.args = (f"recorder.watch() cannot follow this loader: {what}. To do: {cure}.",)


class BadOptimizer(BacktrailError):
    """The optimizer is used in a way that a run cannot hold."""

    def __init__(self, what: str) -> None:
        self.args = (f"The optimizer cannot be recorded: {what}.",)


class UnwatchedStep(BacktrailError):
    """The optimizer stepped and no watched batch led to it."""

    def __init__(self, step: int) -> None:
        self.args = (
            f"Step {step} has no batch: the optimizer was called without a backward pass on a batch from "
            "recorder.watch(loader). Loop over recorder.watch(loader) instead of the loader, and use one optimizer.",
        )


class BadPolicy(BacktrailError):
    """A checkpoint policy cannot be followed."""

    def __init__(self, policy: str) -> None:
        self.args = (
            f"checkpoints={policy} keeps nothing: period and window must be at least 1, ratio more than 1.",
        )


class UnreadableData(BacktrailError):
    """The task's data set cannot be read by row number."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"The task's data set is a {kind}, which has no rows that can be read again by number. "
            "Give the task a map-style data set (with __len__ and __getitem__), or Task(ids=...) where batches tell "
            "the ids of their samples.",
        )


class UnrepeatableRows(BacktrailError):
    """Rows of the data set read differently the second time."""

    def __init__(self, step: int, samples: Sequence[int]) -> None:
        self.args = (
            f"Step {step}: rows {join_items(samples, most=6)} read again from the task's data set "
            "are not what the loop "
            "was fed, so no replay could follow. Usual causes: rows augmented at random (record with "
            "keep_batches=True); another data set than the loader's.",
        )


class OtherSlots(BacktrailError):
    """What is fed has other slots than the batch it stands for."""

    def __init__(self, rows: int, samples: int) -> None:
        self.args = (
            f"recorder.fed() got {rows} rows for a batch of {samples} samples. It must have the same slots in the same "
            "order: one row per sample of the batch last yielded.",
        )


class SparseGradient(BacktrailError):
    """A parameter receives gradients that are not dense tensors."""

    def __init__(self, name: str, step: int) -> None:
        self.args = (
            f"Step {step}: parameter {name!r} receives a sparse gradient, which has no replay. "
            "Create its layer with sparse=False (nn.Embedding, nn.EmbeddingBag).",
        )


class StaleGradient(BacktrailError):
    """Gradients of an earlier step were not cleared."""

    def __init__(self, step: int) -> None:
        self.args = (
            f"At step {step} the gradients of the step before were still there: they belong to other parameters, so "
            "no replay can explain their sum. Call optimizer.zero_grad() once per step.",
        )


class ChangedOutside(BacktrailError):
    """Something besides the recorded optimizer changed a parameter."""

    def __init__(self, name: str, step: int) -> None:
        self.args = (
            f"Parameter {name!r} was changed between steps {step - 1} and {step} by something other than the recorded "
            "optimizer (a second optimizer, load_state_dict, an assignment). A run has one optimizer and nothing else.",
        )


class Diverged(BacktrailError):
    """A gradient is NaN or infinite."""

    def __init__(self, step: int, norm: float) -> None:
        self.args = (
            f"The gradient of step {step} has norm {norm}: the training diverged, and what follows cannot be "
            f"attributed. The run is whole up to step {step - 1}; look at its loss and learning rate.",
        )


class UnexplainedGradient(BacktrailError):
    """The recorder's own gradient differs from the loop's."""

    def __init__(
        self, step: int, off: float, tolerance: float, *, ours: float, theirs: float
    ) -> None:
        self.args = (
            f"Step {step}: the gradient computed from the task (norm {ours:.4g}) and the one that the loop gave the "
            f"optimizer (norm {theirs:.4g}) differ by {off:.2g} (relative), tolerance {tolerance:.2g}. Usual causes: "
            "Task(reduce=...) is not how the loop averages; clipping in the loop without Task(clip=...); a regulariser "
            "without Task(penalty=...); rows augmented at random (record with keep_batches=True); a batch changed in "
            "the loop, or random numbers drawn in it before the forward pass (recorder.fed(batch) right before it).",
        )
