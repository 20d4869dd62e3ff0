"""What can go wrong with an influence: what is asked of it, and its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, join_items


class NotObserved(BacktrailError):
    """A state was asked for that no query has read."""

    def __init__(self, state: int, observed: Sequence[int]) -> None:
        self.args = (
            f"State {state} was not observed; there are 0 (where all influence is zero) "
            f"and {join_items(observed)}. Use one of those, or attribute again with {state} "
            "in observed_at.",
        )


class UnknownQuery(BacktrailError):
    """A query was asked for by a name or index that is not there."""

    def __init__(self, query: int | str, names: Sequence[str]) -> None:
        self.args = (
            f"There is no query {query!r}; there are {len(names)}, by index 0 to {len(names) - 1} "
            f"or by name: {join_items([repr(name) for name in names])}.",
        )


class UnknownSample(BacktrailError):
    """A sample was asked for that the training set does not have."""

    def __init__(self, sample: int, samples: int) -> None:
        self.args = (
            f"There is no sample {sample}: the training set has {samples} rows, numbered 0 to {samples - 1}.",
        )


class UnknownId(BacktrailError):
    """A sample was asked for by an id that the training never saw."""

    def __init__(self, sample: int, ids: Sequence[int]) -> None:
        self.args = (
            f"There is no sample {sample}: the training saw {len(ids)} samples, with ids {join_items(ids, most=6)}.",
        )


class ImpossibleWindow(BacktrailError):
    """A window or a range of steps does not lie within the training."""

    def __init__(self, start: int, stop: int, steps: int) -> None:
        self.args = (
            f"({start}, {stop}) is no stretch of this training: "
            f"it needs 0 <= start <= stop <= {steps}, the number of steps.",
        )


class TwoViewpoints(BacktrailError):
    """Both a window and an observed state were given."""

    def __init__(self, window: tuple[int, int], observed_at: int | str) -> None:
        self.args = (
            f"window={window} and observed_at={observed_at!r} exclude each other: a window is seen "
            f"from its own two ends. Leave one out, or use visits({window[0]}, {window[1]}, "
            f"observed_at={observed_at!r}).",
        )


class TooFewWindows(BacktrailError):
    """A pattern over time was asked of too few observed states."""

    def __init__(self, windows: int, needed: int) -> None:
        self.args = (
            f"A pattern over time needs at least {needed} windows between observed states; there "
            f'are {windows}. Attribute again with more, for example observed_at="epochs".',
        )


class TooFewSteps(BacktrailError):
    """Regimes of a training were asked for that has too few steps with a learning rate and an influence."""

    def __init__(self, steps: int, needed: int) -> None:
        self.args = (
            f"Regimes need at least {needed} steps with a learning rate and an influence above 0; there are {steps}. "
            "Ask at a later state, or of a longer run.",
        )


class NoRegimes(BacktrailError):
    """Stretches of a training were to be taken from its regimes, and it has none."""

    def __init__(self, told: object) -> None:
        self.args = (
            f"{told}\nSay which steps to select in, for example ranges={{'first tenth': [(0, 40)]}}.",
        )


class NotFinite(BacktrailError):
    """Some influence, or another score of samples, is NaN or infinite."""

    def __init__(self, samples: Sequence[int], *, scored: bool = False) -> None:
        what, why = (
            (
                "score",
                "Losses of the training overflowed, or a sweep did: rank by checkpoints=[...] before that.",
            )
            if scored
            else (
                "influence",
                "The sweep overflowed: look at its growth in the trust check, try a calmer curvature.",
            )
        )
        self.args = (
            f"The {what} of {len(samples)} samples is not finite: {join_items(samples)}. {why}",
        )


class NotAnInfluence(BacktrailError):
    """A folder does not hold an influence."""

    def __init__(self, path: Path, reason: str) -> None:
        self.args = (
            f"{path} holds no influence: {reason}. Give the folder that attribute(out=...) wrote.",
        )


class DamagedInfluence(BacktrailError):
    """A file of an influence is missing, cut short or changed."""

    def __init__(self, path: Path | None, reason: str) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (f"The influence {where} is damaged: {reason}. Delete it and attribute again.",)


class UnfinishedInfluence(BacktrailError):
    """An attribution was interrupted."""

    def __init__(self, path: Path | None, done: int, shards: int) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (
            f"The influence {where} is unfinished: {done} of {shards} shards are done. "
            "Call attribute again with the same arguments to resume.",
        )


class DifferentInfluence(BacktrailError):
    """An attribution cannot resume in a folder that was begun with other arguments."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        told = "; ".join(
            f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences.items()
        )
        self.args = (
            f"{path} holds another influence ({told}). "
            "PerSampleRule the same arguments to resume it, or another folder, or delete this one.",
        )


class FolderTaken(BacktrailError):
    """A new influence was to be written where there already is something."""

    def __init__(self, path: Path) -> None:
        self.args = (
            f"{path} already exists and is not empty. Choose another folder, or delete this one.",
        )


class IllFormedInfluence(BacktrailError):
    """What a method wants to write does not fit together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.args = ("This cannot be an influence: " + "; ".join(problems) + ".",)
