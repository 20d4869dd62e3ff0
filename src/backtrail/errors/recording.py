"""Errors while a training is recorded."""

from collections.abc import Sequence

from backtrail.errors.sentences import BacktrailError, join_items


class UnwatchableLoader(BacktrailError, ValueError):
    """The batches of a loader could not be read again."""

    def __init__(self, what: str, cure: str) -> None:
        self.args = (f"recorder.watch() cannot record this loader: {what}. Fix: {cure}.",)


class BadOptimizer(BacktrailError, ValueError):
    """The optimizer is used in a way that cannot be recorded."""

    def __init__(self, what: str) -> None:
        self.args = (f"This optimizer cannot be recorded: {what}.",)


class UnwatchedStep(BacktrailError, RuntimeError):
    """The optimizer made a step that no recorded batch led to."""

    def __init__(self, step: int) -> None:
        self.args = (
            f"Step {step} has no batch: optimizer.step() was called without a backward pass on a "
            "batch from recorder.watch(loader). Loop over recorder.watch(loader) instead of the "
            "loader, and use one optimizer.",
        )


class BadPolicy(BacktrailError, ValueError):
    """A checkpoint policy has settings with which it keeps nothing."""

    def __init__(self, policy: str) -> None:
        self.args = (
            f"{policy} is not a valid checkpoint policy: period and window must be >= 1, ratio "
            "must be > 1.",
        )


class UnreadableData(BacktrailError, TypeError):
    """The task's data set cannot be read by row number."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"The task's data set is a {kind}, whose rows cannot be read by number. Give the task "
            "a map-style data set (with __len__ and __getitem__), or Task(ids=...) where batches "
            "contain the ids of their samples.",
        )


class UnrepeatableRows(BacktrailError, RuntimeError):
    """Rows of the data set differ when they are read again."""

    def __init__(self, step: int, samples: Sequence[int]) -> None:
        self.args = (
            f"Step {step}: rows {join_items(samples, most=6)} of the task's data set differ from "
            "what the loop was fed when they are read again, so the step cannot be replayed. Usual "
            "causes: random augmentation of rows (record with keep_batches=True); a loader over "
            "another data set than the task's.",
        )


class OtherSlots(BacktrailError, ValueError):
    """A replaced batch has another number of rows than the one it stands for."""

    def __init__(self, rows: int, samples: int) -> None:
        self.args = (
            f"recorder.fed() got {rows} rows for a batch of {samples} samples. Expected one row "
            "per sample of the batch last yielded, in the same order.",
        )


class SparseGradient(BacktrailError, RuntimeError):
    """A parameter receives a sparse gradient."""

    def __init__(self, name: str, step: int) -> None:
        self.args = (
            f"Step {step}: parameter {name!r} receives a sparse gradient, which cannot be "
            "replayed. Create its layer with sparse=False (nn.Embedding, nn.EmbeddingBag).",
        )


class StaleGradient(BacktrailError, RuntimeError):
    """Gradients of an earlier step were not cleared."""

    def __init__(self, step: int) -> None:
        self.args = (
            f"Step {step}: the gradients of the step before were not cleared. They belong to other "
            "parameters, so their sum cannot be replayed. Call optimizer.zero_grad() once per "
            "step.",
        )


class ChangedOutside(BacktrailError, RuntimeError):
    """A parameter was changed by something other than the recorded optimizer."""

    def __init__(self, name: str, step: int) -> None:
        self.args = (
            f"Parameter {name!r} was changed between steps {step - 1} and {step} by something "
            "other than the recorded optimizer (a second optimizer, load_state_dict, an "
            "assignment). A run records one optimizer: let it make all changes.",
        )


class Diverged(BacktrailError, RuntimeError):
    """A gradient is NaN or infinite."""

    def __init__(self, step: int, norm: float) -> None:
        self.args = (
            f"The gradient of step {step} has norm {norm}: the training diverged, and later steps "
            f"cannot be attributed. The run is complete up to step {step - 1}; check its loss and "
            "learning rate there.",
        )


class UnexplainedGradient(BacktrailError, RuntimeError):
    """The gradient computed from the task differs from the training loop's."""

    def __init__(
        self, step: int, off: float, tolerance: float, *, ours: float, theirs: float
    ) -> None:
        self.args = (
            f"Step {step}: the gradient computed from the task (norm {ours:.4g}) and the one that "
            f"the loop gave the optimizer (norm {theirs:.4g}) differ by {off:.2g} (relative), "
            f"tolerance {tolerance:.2g}. Usual causes: Task(reduce=...) is not how the loop "
            "averages; the loop clips and Task(clip=...) is missing; a regulariser without "
            "Task(penalty=...); random augmentation of rows (record with keep_batches=True); a "
            "batch changed in the loop, or random numbers drawn in it before the forward pass "
            "(call recorder.fed(batch) right before it).",
        )


class NoDerivative(BacktrailError, RuntimeError):
    """The gradient of a step cannot be differentiated, which every attribution needs."""

    def __init__(self, exact: Exception, differences: Exception) -> None:
        # Recorded anyway, such a training could be replayed and nothing else.
        self.args = (
            "Step 0: the gradient of this training cannot be differentiated, so its influence "
            f"cannot be computed: by autograd, {_short(exact)}; by differences of gradients, "
            f"{_short(differences)}. Usual causes: loss.backward(), .numpy() or .item() of a "
            "result inside predict or loss; an operation without a derivative. Let predict and "
            "loss return tensors that autograd can follow.",
        )


def _short(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:200]}"
