"""What can go wrong with a task: its loss, its model, its optimizer, and what is asked of the model."""

from collections.abc import Sequence

from backtrail.errors.sentences import BacktrailError


class BadLoss(BacktrailError):
    """The task's loss is not one value per slot."""

    def __init__(self, got: object) -> None:
        self.args = (
            f"loss(outputs, batch) must return a tensor [slot], one unreduced value per row; it returned {got}. "
            "Use reduction='none' and average over every other axis.",
        )


class BadReduction(BacktrailError):
    """The task's reduction does not give one factor per slot."""

    def __init__(self, got: tuple[int, ...], slots: int) -> None:
        self.args = (
            f"reduce(batches) must return a tensor [slot] with a factor for each of the step's {slots} slots; "
            f"it returned shape {list(got)}.",
        )


class BadIds(BacktrailError):
    """A batch does not tell the ids of its samples."""

    def __init__(self, ids: object, problem: str) -> None:
        self.args = (
            f"Task(ids={ids!r}) must tell a whole number, 0 or more, for every row of a batch: {problem}. Give the key "
            "of a dict, the place in a tuple, or a function of the batch.",
        )


class NoLabels(BacktrailError):
    """A language model's batch does not say which tokens are to be predicted."""

    def __init__(self, names: Sequence[str]) -> None:
        self.args = (
            f"A language model's batch needs 'labels'; it has {list(names)}. Let the rows or collate= add them: a copy "
            "of 'input_ids' with -100 where nothing is to be predicted (padding, prompts).",
        )


class SharedStorage(BacktrailError):
    """Two parameters of the model share memory without being the same parameter."""

    def __init__(self, first: str, second: str) -> None:
        self.args = (
            f"Parameters {first!r} and {second!r} are two objects on one storage: the optimizer moves that memory "
            "twice a step, which no replay can follow. Tie them as one parameter: module.weight = other.weight.",
        )


class UnsupportedOptimizer(BacktrailError):
    """The optimizer has no derivative that a sweep could use."""

    def __init__(self, name: str, reason: str, supported: Sequence[str]) -> None:
        self.args = (f"{name} cannot be attributed: {reason}. Supported: {', '.join(supported)}.",)


class BadQuery(BacktrailError):
    """A query asks for something that is not there."""

    def __init__(self, asked: str, there: str) -> None:
        self.args = (f"The query asks for {asked}, but {there}.",)
