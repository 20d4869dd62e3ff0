"""What can go wrong: each class builds its sentence, what happened, with values, what to do."""

from collections.abc import Mapping, Sequence
from pathlib import Path


class WhenceError(Exception):
    """What every error of this library derives from."""

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes as the finished sentence, whatever the constructor takes."""
        return _rebuilt, (type(self), self.args)


def _rebuilt(kind: type[WhenceError], args: tuple[object, ...]) -> WhenceError:
    error = kind.__new__(kind)
    error.args = args
    return error


def listed(items: Sequence[object], most: int = 20) -> str:
    """Join items for a message, with the middle left out where there are many.

    >>> listed([3, 5, 8]), listed(range(100), most=4)
    ('3, 5, 8', '0, 1, ... (96 more) ..., 98, 99')
    """
    texts = [str(item) for item in items]
    if len(texts) > most:
        half = most // 2
        texts = [
            *texts[:half],
            f"... ({len(texts) - 2 * half} more) ...",
            *texts[len(texts) - half :],
        ]
    return ", ".join(texts)


class MissingExtra(WhenceError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self.args = (f"This needs {module!r}: pip install 'whence[{extra}]'.",)


# ---- influence: asking


class NotObserved(WhenceError):
    """A state was asked for that no query has read."""

    def __init__(self, state: int, observed: Sequence[int]) -> None:
        self.args = (
            f"State {state} was not observed; there are 0 (where all influence is zero) "
            f"and {listed(observed)}. Use one of those, or attribute again with {state} "
            "in observed_at.",
        )


class UnknownQuery(WhenceError):
    """A query was asked for by a name or index that is not there."""

    def __init__(self, query: int | str, names: Sequence[str]) -> None:
        self.args = (
            f"There is no query {query!r}; there are {len(names)}, by index 0 to {len(names) - 1} "
            f"or by name: {listed([repr(name) for name in names])}.",
        )


class UnknownSample(WhenceError):
    """A sample was asked for that the training set does not have."""

    def __init__(self, sample: int, samples: int) -> None:
        self.args = (f"There is no sample {sample}: the training set has {samples} rows, numbered 0 to {samples - 1}.",)


class ImpossibleWindow(WhenceError):
    """A window or a range of steps does not lie within the training."""

    def __init__(self, start: int, stop: int, steps: int) -> None:
        self.args = (
            f"({start}, {stop}) is no stretch of this training: "
            f"it needs 0 <= start <= stop <= {steps}, the number of steps.",
        )


class TwoViewpoints(WhenceError):
    """Both a window and an observed state were given."""

    def __init__(self, window: tuple[int, int], observed_at: int | str) -> None:
        self.args = (
            f"window={window} and observed_at={observed_at!r} exclude each other: a window is seen "
            f"from its own two ends. Leave one out, or use visits({window[0]}, {window[1]}, "
            f"observed_at={observed_at!r}).",
        )


class TooFewWindows(WhenceError):
    """A pattern over time was asked of too few observed states."""

    def __init__(self, windows: int, needed: int) -> None:
        self.args = (
            f"A pattern over time needs at least {needed} windows between observed states; there "
            f'are {windows}. Attribute again with more, for example observed_at="epochs".',
        )


class NotFinite(WhenceError):
    """Some influence is NaN or infinite."""

    def __init__(self, samples: Sequence[int]) -> None:
        self.args = (
            f"The influence of {len(samples)} samples is not finite: {listed(samples)}. "
            "The sweep overflowed: look at its growth in the trust check, try a calmer curvature.",
        )


# ---- influence: on disk


class NotAnInfluence(WhenceError):
    """A folder does not hold an influence."""

    def __init__(self, path: Path, reason: str) -> None:
        self.args = (f"{path} holds no influence: {reason}. Give the folder that attribute(out=...) wrote.",)


class DamagedInfluence(WhenceError):
    """A file of an influence is missing, cut short or changed."""

    def __init__(self, path: Path | None, reason: str) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (f"The influence {where} is damaged: {reason}. Delete it and attribute again.",)


class UnfinishedInfluence(WhenceError):
    """An attribution was interrupted."""

    def __init__(self, path: Path | None, done: int, shards: int) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (
            f"The influence {where} is unfinished: {done} of {shards} shards are done. "
            "Call attribute again with the same arguments to resume.",
        )


class DifferentInfluence(WhenceError):
    """An attribution cannot resume in a folder that was begun with other arguments."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        told = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences.items())
        self.args = (
            f"{path} holds another influence ({told}). "
            "Use the same arguments to resume it, or another folder, or delete this one.",
        )


class FolderTaken(WhenceError):
    """A new influence was to be written where there already is something."""

    def __init__(self, path: Path) -> None:
        self.args = (f"{path} already exists and is not empty. Choose another folder, or delete this one.",)


class IllFormedInfluence(WhenceError):
    """What a method wants to write does not fit together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.args = ("This cannot be an influence: " + "; ".join(problems) + ".",)


# ---- task and training


class BadLoss(WhenceError):
    """The task's loss is not one value per slot."""

    def __init__(self, got: object) -> None:
        self.args = (
            f"loss(outputs, batch) must return a tensor [slot], one unreduced value per row; it returned {got}. "
            "Use reduction='none' and average over every other axis.",
        )


class BadReduction(WhenceError):
    """The task's reduction does not give one factor per slot."""

    def __init__(self, got: tuple[int, ...], slots: int) -> None:
        self.args = (
            f"reduce(batches) must return a tensor [slot] with a factor for each of the step's {slots} slots; "
            f"it returned shape {list(got)}.",
        )


class SharedStorage(WhenceError):
    """Two parameters of the model share memory without being the same parameter."""

    def __init__(self, first: str, second: str) -> None:
        self.args = (
            f"Parameters {first!r} and {second!r} are two objects on one storage: the optimizer moves that memory "
            "twice a step, which no replay can follow. Tie them as one parameter: module.weight = other.weight.",
        )


class UnsupportedOptimizer(WhenceError):
    """The optimizer has no derivative that a sweep could use."""

    def __init__(self, name: str, reason: str) -> None:
        self.args = (
            f"{name} cannot be attributed: {reason}. Supported: SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, "
            "Adadelta, Adamax, ASGD.",
        )


class BadQuery(WhenceError):
    """A query asks for something that is not there."""

    def __init__(self, asked: str, there: str) -> None:
        self.args = (f"The query asks for {asked}, but {there}.",)


# ---- run folders


class NotARun(WhenceError):
    """A folder holds no recording."""

    def __init__(self, folder: Path) -> None:
        self.args = (
            f"{folder} holds no run (no manifest.json). Record one with whence.Recorder({str(folder)!r}, ...).",
        )


class RunExists(WhenceError):
    """A recorder was pointed at a folder that already holds a run."""

    def __init__(self, folder: Path) -> None:
        self.args = (f"{folder} already holds a run, and nothing recorded is ever overwritten. Choose another folder.",)


class WrongFormat(WhenceError):
    """A folder was written in a layout that this version does not read."""

    def __init__(self, path: Path, found: object, wanted: int) -> None:
        self.args = (f"{path} has format {found}; this version of whence reads format {wanted}.",)


class DamagedFile(WhenceError):
    """A file of a run is missing or is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        self.args = (f"{path} cannot be used: {what}. Restore the file from a copy, or record the run again.",)


class EmptyRun(WhenceError):
    """A run has no whole step."""

    def __init__(self, folder: Path) -> None:
        self.args = (f"The run in {folder} has no whole step: the training ended before its first update.",)


class WrongModel(WhenceError):
    """The task's model is not the one that was recorded."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.args = ("The task's model is not the recorded one: " + "; ".join(problems) + ".",)


class WrongData(WhenceError):
    """The task's data set is not the one that was recorded."""

    def __init__(self, what: str) -> None:
        self.args = (
            f"The task's data set is not the recorded one: {what}. Give the task the data set of the training, rows in "
            "the same order; if rows are augmented at random, record with keep_batches=True.",
        )


class BadBatch(WhenceError):
    """A batch cannot be stored."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"keep_batches=True stores tuples, lists and dicts of tensors and plain values; this batch holds a {kind}. "
            "Convert it in the collate function.",
        )


class NoSuchState(WhenceError):
    """A state or step was asked for that the run does not have."""

    def __init__(self, number: int, last: int, what: str) -> None:
        self.args = (f"There is no {what} {number}: the run has {what}s 0 to {last}.",)


class MissingState(WhenceError):
    """No checkpoint was kept at a state."""

    def __init__(self, number: int, kept: Sequence[int]) -> None:
        before = max(state for state in kept if state <= number)
        self.args = (
            f"State {number} was not kept; kept: {listed(kept)}. "
            f"run.state({number}, replay=True) replays it from state {before}.",
        )


class ReplayMismatch(WhenceError):
    """A replayed step differs from the recorded one."""

    def __init__(self, step: int, what: str, off: tuple[float, float]) -> None:
        self.args = (
            f"Step {step} does not replay: {what} differs by {off[0]:.2g} (relative), tolerance {off[1]:.2g}. "
            "Usual causes: another data set or data order, rows augmented at random (record with keep_batches=True), "
            "another version or device of torch. run.verify(tolerance=...) sets the tolerance.",
        )


# ---- recording


class UnwatchableLoader(WhenceError):
    """A loader's batches could not be read again."""

    def __init__(self, what: str, cure: str) -> None:
        self.args = (f"recorder.watch() cannot follow this loader: {what}. To do: {cure}.",)


class BadOptimizer(WhenceError):
    """The optimizer is used in a way that a run cannot hold."""

    def __init__(self, what: str) -> None:
        self.args = (f"The optimizer cannot be recorded: {what}.",)


class UnwatchedStep(WhenceError):
    """The optimizer stepped and no watched batch led to it."""

    def __init__(self, step: int) -> None:
        self.args = (
            f"Step {step} has no batch: the optimizer was called without a backward pass on a batch from "
            "recorder.watch(loader). Loop over recorder.watch(loader) instead of the loader, and use one optimizer.",
        )


class BadPolicy(WhenceError):
    """A checkpoint policy cannot be followed."""

    def __init__(self, policy: str) -> None:
        self.args = (f"checkpoints={policy} keeps nothing: period and window must be at least 1, ratio more than 1.",)


class UnreadableData(WhenceError):
    """The task's data set cannot be read by row number."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"The task's data set is a {kind}, which has no rows that can be read again by number. "
            "Give the task a map-style data set (with __len__ and __getitem__).",
        )


class UnrepeatableRows(WhenceError):
    """Rows of the data set read differently the second time."""

    def __init__(self, step: int, samples: Sequence[int]) -> None:
        self.args = (
            f"Step {step}: rows {listed(samples, most=6)} read again from the task's data set are not what the loop "
            "was fed, so no replay could follow. Usual causes: rows augmented at random (record with "
            "keep_batches=True); another data set than the loader's.",
        )


class OtherSlots(WhenceError):
    """What is fed has other slots than the batch it stands for."""

    def __init__(self, rows: int, samples: int) -> None:
        self.args = (
            f"recorder.fed() got {rows} rows for a batch of {samples} samples. It must have the same slots in the same "
            "order: one row per sample of the batch last yielded.",
        )


class SparseGradient(WhenceError):
    """A parameter receives gradients that are not dense tensors."""

    def __init__(self, name: str, step: int) -> None:
        self.args = (
            f"Step {step}: parameter {name!r} receives a sparse gradient, which has no replay. "
            "Create its layer with sparse=False (nn.Embedding, nn.EmbeddingBag).",
        )


class StaleGradient(WhenceError):
    """Gradients of an earlier step were not cleared."""

    def __init__(self, step: int) -> None:
        self.args = (
            f"At step {step} the gradients of the step before were still there: they belong to other parameters, so "
            "no replay can explain their sum. Call optimizer.zero_grad() once per step.",
        )


class ChangedOutside(WhenceError):
    """Something besides the recorded optimizer changed a parameter."""

    def __init__(self, name: str, step: int) -> None:
        self.args = (
            f"Parameter {name!r} was changed between steps {step - 1} and {step} by something other than the recorded "
            "optimizer (a second optimizer, load_state_dict, an assignment). A run has one optimizer and nothing else.",
        )


class Diverged(WhenceError):
    """A gradient is NaN or infinite."""

    def __init__(self, step: int, norm: float) -> None:
        self.args = (
            f"The gradient of step {step} has norm {norm}: the training diverged, and what follows cannot be "
            f"attributed. The run is whole up to step {step - 1}; look at its loss and learning rate.",
        )


class UnexplainedGradient(WhenceError):
    """The recorder's own gradient differs from the loop's."""

    def __init__(self, step: int, off: float, tolerance: float, *, ours: float, theirs: float) -> None:
        self.args = (
            f"Step {step}: the gradient computed from the task (norm {ours:.4g}) and the one that the loop gave the "
            f"optimizer (norm {theirs:.4g}) differ by {off:.2g} (relative), tolerance {tolerance:.2g}. Usual causes: "
            "Task(reduce=...) is not how the loop averages; clipping in the loop without Task(clip=...); a regulariser "
            "without Task(penalty=...); rows augmented at random (record with keep_batches=True); a batch changed in "
            "the loop, or random numbers drawn in it before the forward pass (recorder.fed(batch) right before it).",
        )


class CannotRenormalize(WhenceError):
    """Renormalised denominators have no meaning for a run."""

    def __init__(self, why: str) -> None:
        self.args = (f"denominator='renormalize' does not fit this run: {why}. Use denominator='keep'.",)


class TooLittleMemory(WhenceError):
    """A sweep does not fit."""

    def __init__(self, free: int, needed: int, rows: int) -> None:
        self.args = (
            f"A sweep with {rows} cotangents (queries x observed states) needs {needed / 2**20:.0f} MiB, and may use "
            f"{free / 2**20:.0f} MiB. Ask fewer queries or states at once, or allow more: DIT(memory=bytes).",
        )


class WithoutQueries(WhenceError):
    """An influence is to be checked, and what was asked is not known."""

    def __init__(self, names: Sequence[str]) -> None:
        self.args = (
            f"The checks ask the queries again, and this influence comes without them. Give the same queries: "
            f"trust(run, influence, queries=...), with the names {listed(names, most=6)}.",
        )


# ---- command line


class BadReference(WhenceError):
    """An object is not named as file and name, or its file is not there."""

    def __init__(self, reference: str, missing: Path | None = None) -> None:
        problem = f"{reference!r} does not name a Python file and something in it" if missing is None else ""
        self.args = (f"{problem or f'There is no file {missing}'}. Write FILE.py:NAME, for example my_file.py:task.",)


class BrokenFile(WhenceError):
    """A file of the user's fails while it is read."""

    def __init__(self, path: Path, line: int | None, error: Exception) -> None:
        where = f"{path}" if line is None else f"{path}, line {line}"
        self.args = (
            f"{where}: {type(error).__name__}: {error}. The file is run to read it: keep the training itself under "
            "if __name__ == '__main__'.",
        )


class NotInFile(WhenceError):
    """A file does not hold what was named, or holds it as something else."""

    def __init__(self, reference: str, wanted: str, *, found: str, there: Sequence[str]) -> None:
        path, _, name = reference.rpartition(":")
        problem = f"has no {name!r}" if found == "NoneType" else f"has {name!r}, which is a {found}, not a {wanted}"
        others = f"A {wanted} there: {listed(there)}" if there else f"There is no {wanted} in it"
        self.args = (f"{path} {problem}. {others}.",)


class OtherRun(WhenceError):
    """An influence is to be checked against a run that it was not made from."""

    def __init__(self, influence: Path, made_from: str, *, run: Path, given: str) -> None:
        self.args = (
            f"{influence} was made from the run {made_from}, and {run} is the run {given}. "
            "Give the folder of its own run.",
        )
