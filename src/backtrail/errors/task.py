"""Errors of a task: its loss, model and optimizer, and of queries on it."""

from collections.abc import Sequence

from backtrail.errors.sentences import BacktrailError


class BadLoss(BacktrailError, ValueError):
    """The task's loss is not one value per slot."""

    def __init__(self, got: object) -> None:
        self.args = (
            "Invalid loss: loss(outputs, batch) must return a tensor [slot], one unreduced value "
            f"per row; it returned {got}. Use reduction='none', and average over all other axes.",
        )


class SeveralLabels(BadLoss):
    """A row of a classification has several labels, such as one for each pixel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.args = (
            f"classification() expects one label per row, and these labels give losses of shape "
            f"{list(shape)}, such as one per pixel. How they are averaged has to be that of the "
            "loop. For a mean over the pixels of a row: backtrail.Task(model, data, loss=lambda "
            "outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1], "
            "reduction='none').flatten(1).mean(1)). For tokens: backtrail.language_model.",
        )


class BadTotal(BacktrailError, ValueError):
    """The task's loss of a whole batch is not a scalar."""

    def __init__(self, got: str) -> None:
        self.args = (
            "Invalid total: total(outputs, batch, weights) must return a tensor without axes, the "
            f"loss of the batch; it returned {got}.",
        )


class NoRowLosses(BacktrailError, ValueError):
    """A method needs the loss of single rows, and the task has one of the whole batch."""

    def __init__(self) -> None:
        self.args = (
            "This needs the loss of every row, and the task has one value for a whole batch, "
            "Task(total=...). Use backtrail.DIT() with a backtrail.Custom query, or "
            "backtrail.leave_one_out; or give the task a loss= with one value per row.",
        )


class BadReduction(BacktrailError, ValueError):
    """The task's reduction is not one factor per slot."""

    def __init__(self, got: tuple[int, ...], slots: int) -> None:
        self.args = (
            "Invalid reduce: reduce(batches) must return a tensor [slot] with a factor for each of "
            f"the step's {slots} slots; it returned shape {list(got)}.",
        )


class BadIds(BacktrailError, ValueError):
    """A batch does not contain the ids of its samples."""

    def __init__(self, ids: object, problem: str) -> None:
        self.args = (
            f"Invalid Task(ids={ids!r}): it must give a non-negative integer for every row of a "
            f"batch, but {problem}. Give the key of a dict, the index in a tuple, or a function of "
            "the batch.",
        )


class NoRows(BacktrailError, ValueError):
    """A batch has no tensor by which its rows could be counted."""

    def __init__(self, kind: str) -> None:
        self.args = (
            f"This batch is a {kind} without a tensor that has an axis, so its rows cannot be "
            "counted. Expected a tensor, or tensors in tuples, lists or dicts, with one row per "
            "sample on the first axis.",
        )


class NoLabels(BacktrailError, KeyError):
    """A language model's batch has no labels."""

    def __init__(self, names: Sequence[str]) -> None:
        self.args = (
            f"A language model's batch needs the key 'labels'; this one has {list(names)}. Add "
            "them in the data set or in collate=: a copy of 'input_ids' with -100 where nothing is "
            "to be predicted (padding, prompts).",
        )


class SharedStorage(BacktrailError, ValueError):
    """Two parameters share memory without being the same parameter."""

    def __init__(self, first: str, second: str) -> None:
        self.args = (
            f"Parameters {first!r} and {second!r} are two objects with one storage: the optimizer "
            "updates it twice per step, which cannot be replayed. Tie them as one parameter: "
            "module.weight = other.weight.",
        )


class LiveParameter(BacktrailError, ValueError):
    """A function of the model uses a parameter of the live model directly."""

    def __init__(self, parameter: str, place: str) -> None:
        self.args = (
            f"A function in {place} uses parameter {parameter!r} of the live model "
            "directly (a global or closed-over variable), so it cannot be replayed with other "
            "values. Read it from the module that the function is given: a method with self, or "
            "the first argument of a hook.",
        )


class UnsupportedOptimizer(BacktrailError, TypeError):
    """The optimizer's update cannot be differentiated."""

    def __init__(self, name: str, reason: str, supported: Sequence[str]) -> None:
        self.args = (f"{name} cannot be attributed: {reason}. Supported: {', '.join(supported)}.",)


class BadQuery(BacktrailError, ValueError):
    """A query reads something that does not exist."""

    def __init__(self, needed: str, available: str) -> None:
        self.args = (f"The query needs {needed}, but {available}.",)
