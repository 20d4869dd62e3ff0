"""Errors while a training is recorded."""

from collections.abc import Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items

ONE_RUN_EACH = (
    "For a training in several phases, record each phase as a run of its own: leave the `with` "
    "block of the recorder before the change, and open another Recorder, in another folder, with "
    "the optimizer of the next phase."
)


# What a recording of plain steps on watched batches cannot see.
CAUSES = (
    "random augmentation of rows (record with keep_batches=True); a batch changed in the loop, or "
    "random numbers drawn in it before the forward pass (call recorder.fed(batch) right before "
    "it); Python or NumPy random numbers in loss, predict or the model (draw them in the loop, "
    "into the batch); a loss, predict or model with memory of its own (a counter, a running mean, "
    "a carried hidden state) or a schedule kept outside of the batch (put its value into the "
    "batch, with recorder.fed(batch)); hooks that change gradients, or gradients that the loop "
    "rescales or adds noise to (declare it in the task, or take it out); an optimizer that takes "
    "two passes a step (SAM), or a closure; a backward pass on a batch of a second loader that is "
    "not watched; "
    "gradients averaged over several processes (DistributedDataParallel: record on one process); a "
    "GradScaler that is not unscaled before clipping (scaler.unscale_(optimizer))."
)


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
            "must be > 1 and finite, steps must be >= 0; all but the ratio are whole numbers.",
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


class NotEntered(BacktrailError, RuntimeError):
    """A recorder is used outside of its `with` block."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"The recorder of {folder} is not recording: a watched batch was asked for outside of "
            "its `with` block, so nothing would be stored. Write `with backtrail.Recorder(...) as "
            "recorder:` around the training loop.",
        )


class ComplexParameter(BacktrailError, TypeError):
    """A trained parameter holds complex numbers."""

    def __init__(self, name: str, dtype: object) -> None:
        self.args = (
            f"Parameter {name!r} is {dtype}, and complex parameters are not supported. Store its "
            "real and imaginary parts in a real parameter (torch.view_as_real), and join them in "
            "forward with torch.view_as_complex.",
        )


class RenormalizedEmbedding(BacktrailError, ValueError):
    """A trained embedding changes its own weight in the forward pass."""

    def __init__(self, name: str, max_norm: float) -> None:
        self.args = (
            f"Embedding {name!r} has max_norm={max_norm}: its forward pass writes to the weight "
            "that the optimizer trains, and no derivative passes through that. Use max_norm=None, "
            "and scale the vectors after the lookup: x * (max_norm / x.norm(dim=-1, "
            "keepdim=True).clamp(min=1e-7)).clamp(max=1).",
        )


class CoarseNoise(BacktrailError, TypeError):
    """A model draws random numbers in the precision of autocast."""

    def __init__(self, step: int, draws: Sequence[str]) -> None:
        self.args = (
            f"Step {step} draws random numbers under autocast: {join_items(draws)}. Derivatives "
            "are taken without autocast, where others would be drawn. Draw them in float32, for "
            "example torch.randn_like(x, dtype=torch.float32), and convert them.",
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
            f"assignment). A run records one optimizer: let it make all changes. {ONE_RUN_EACH}",
        )


class OtherOptimizer(BacktrailError, RuntimeError):
    """Parameters changed after a watched batch without a step of the recorded optimizer."""

    def __init__(self, name: str, step: int, optimizer: str) -> None:
        made = "no step yet" if step == 0 else f"no step since step {step - 1}"
        self.args = (
            f"Parameter {name!r} was changed after a watched batch, but the recorded {optimizer} "
            f"made {made}: the loop trains with another optimizer than the one that was given to "
            "the recorder, which records nothing of that. Give Recorder(...) the optimizer whose "
            f"step() the loop calls. {ONE_RUN_EACH}",
        )


class ChangedOptimizerState(BacktrailError, RuntimeError):
    """The optimizer's state was changed by something other than its own steps."""

    def __init__(self, what: str, step: int) -> None:
        self.args = (
            f"The optimizer's state was changed between steps {step - 1} and {step}: {what} (a "
            "reset of the momentum, state.clear(), load_state_dict, a new optimizer in place of "
            "the old). What came before that change does not act through the state any more, which "
            f"a run cannot represent. {ONE_RUN_EACH}",
        )


class ChangedByCheck(BacktrailError, RuntimeError):
    """The self-check changed an object of the user's that cannot be put back."""

    def __init__(self, step: int | None, what: str) -> None:
        place = "" if step is None else f"Step {step}: "
        self.args = (
            f"{place}The recorder's self-check called the task's functions once more than "
            f"the loop, and that {what}, which cannot be put back. The training would not be the "
            "same as without the recorder. Keep such memory out of loss, predict and the data set: "
            "compute what changes from step to step in the loop, and pass it as a part of the "
            "batch with recorder.fed(batch).",
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
        self,
        step: int,
        off: float,
        tolerance: float,
        *,
        ours: float,
        theirs: float,
        clipped: bool = True,
        patched: Sequence[str] = (),
    ) -> None:
        which = "" if clipped else ", both before clipping,"
        forwards = ""
        if patched:
            forwards = (
                f" The forward of {join_items([repr(name) for name in patched], most=4)} was "
                "replaced on the instance by a function that wraps the class's own, and the replay "
                "uses the class's own: if the wrapper changes what is computed, put that into a "
                "subclass or into Task(predict=...)."
            )
        self.args = (
            f"Step {step}: the gradient computed from the task (norm {ours:.4g}) and the one that "
            f"the loop gave the optimizer (norm {theirs:.4g}){which} differ by {off:.2g} "
            f"(relative), tolerance {tolerance:.2g}.{forwards} Usual causes: Task(reduce=...) is "
            "not how the loop averages; the loop clips and Task(clip=...) is missing; a "
            f"regulariser without Task(penalty=...); {CAUSES}",
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
