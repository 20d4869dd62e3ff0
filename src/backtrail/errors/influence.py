"""Errors of an influence: what is read from it, and its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from backtrail.errors.sentences import BacktrailError, count_of, did_you_mean, join_items


class NotObserved(BacktrailError, KeyError):
    """A state was asked for at which no query was read."""

    def __init__(self, state: int, observed: Sequence[int]) -> None:
        self.args = (
            f"State {state} was not observed; available states: 0 (where all influence is zero), "
            f"{join_items(observed)}. Use one of these, or attribute again with {state} in "
            "observed_at.",
        )


class UnknownQuery(BacktrailError, KeyError):
    """There is no query with this name or index."""

    def __init__(self, query: int | str, names: Sequence[str]) -> None:
        quoted = join_items([repr(name) for name in names])
        self.args = (
            f"There is no query {query!r}. Available: index 0 to {len(names) - 1}, or a name: "
            f"{quoted}.{did_you_mean(query, names)}",
        )


class UnknownSample(BacktrailError, KeyError):
    """A sample that the training set does not have."""

    def __init__(self, sample: int, samples: int) -> None:
        self.args = (
            f"There is no sample {sample}: the training set has {count_of(samples, 'row')}, "
            f"numbered 0 to {samples - 1}.",
        )


class UnknownId(BacktrailError, KeyError):
    """A sample id that did not occur in the training."""

    def __init__(self, sample: int, ids: Sequence[int]) -> None:
        self.args = (
            f"There is no sample {sample}: the training used {count_of(len(ids), 'sample')}, with "
            f"ids {join_items(ids, most=6)}.",
        )


class NeverTrainedOn(BacktrailError, ValueError):
    """Samples of the training set that were in no batch of the training."""

    def __init__(self, samples: Sequence[int], seen: int) -> None:
        was = "was" if len(samples) == 1 else "were"
        noun = "Sample" if len(samples) == 1 else "Samples"
        self.args = (
            f"{noun} {join_items(samples, most=6)} {was} never trained on: no recorded batch has "
            f"{'it' if len(samples) == 1 else 'them'}, so there is no influence to compute. The "
            f"training saw {count_of(seen, 'sample')}, which run.seen lists.",
        )


class ImpossibleWindow(BacktrailError, ValueError):
    """A window or a range of steps does not lie within the training."""

    def __init__(self, start: int, stop: int, steps: int) -> None:
        self.args = (
            f"Invalid step range ({start}, {stop}): expected 0 <= start <= stop <= {steps} "
            "(number of steps).",
        )


class TwoViewpoints(BacktrailError, ValueError):
    """Both a window and an observed state were given."""

    def __init__(self, window: tuple[int, int], observed_at: int | str) -> None:
        start, stop = window
        self.args = (
            f"Invalid combination of window={window} and observed_at={observed_at!r}: a window is "
            f"read at its own two ends. Leave one of them out, or use visits({start}, {stop}, "
            f"observed_at={observed_at!r}).",
        )


class TooFewWindows(BacktrailError, ValueError):
    """There are too few observed states for patterns over time."""

    def __init__(self, windows: int, needed: int) -> None:
        self.args = (
            f"Patterns need at least {needed} windows between observed states, and this influence "
            f'has {windows}. Attribute again with more states, for example observed_at="epochs".',
        )


class TooFewSteps(BacktrailError, ValueError):
    """There are too few steps for regimes."""

    def __init__(self, steps: int, needed: int) -> None:
        self.args = (
            f"Regimes need at least {needed} steps whose learning rate and influence are above 0; "
            f"there are {steps}. Use a later observed state, or a longer run.",
        )


class NoRegimes(BacktrailError, ValueError):
    """Ranges of steps were to be taken from the regimes of a training that has none."""

    def __init__(self, summary: object) -> None:
        self.args = (
            f"{summary}\nGive the steps to select in, for example "
            "ranges={'first tenth': [(0, 40)]}.",
        )


class NotFinite(BacktrailError, ValueError):
    """Some influence, or another score of samples, is NaN or infinite."""

    def __init__(self, samples: Sequence[int], *, scored: bool = False) -> None:
        if scored:
            what = "score"
            cure = (
                "Losses of the training or a sweep overflowed: rank by states before that, "
                "checkpoints=[...]"
            )
        else:
            what = "influence"
            cure = (
                "The sweep overflowed: try a bounded curvature, e.g. "
                "DIT(curvature=backtrail.GaussNewton()); backtrail.trust shows the growth"
            )
        self.args = (
            f"The {what} of {count_of(len(samples), 'sample')} is NaN or infinite: "
            f"{join_items(samples)}. {cure}.",
        )


class NonFiniteInfluence(NotFinite):
    """A method computed an influence that is NaN or infinite; it is not stored."""

    def __init__(self, method: str, query: str, observed: int, step: int, sample: int) -> None:
        self.args = (
            f"{method}: the influence of sample {sample} at step {step} on the query {query!r} at "
            f"state {observed} is NaN or infinite, so there is no result. Look at the value of "
            "the query and at the losses around that step: either one is not finite, or its "
            "derivative is not (a square root or a norm at 0, a logarithm of 0), or the sweep "
            "overflowed. For an overflow try a bounded curvature, for example "
            "DIT(curvature=backtrail.GaussNewton()), or an earlier observed_at.",
        )


class NotAnInfluence(BacktrailError, FileNotFoundError):
    """A folder does not hold an influence."""

    def __init__(self, path: Path, reason: str) -> None:
        self.args = (
            f"{path} holds no influence: {reason}. Give the folder that attribute(out=...) wrote.",
        )


class DamagedInfluence(BacktrailError, RuntimeError):
    """A file of an influence is missing, truncated or changed."""

    def __init__(self, path: Path | None, reason: str) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (f"The influence {where} is damaged: {reason}. Delete it and attribute again.",)


class UnfinishedInfluence(BacktrailError, RuntimeError):
    """An attribution was interrupted."""

    def __init__(self, path: Path | None, done: int, shards: int) -> None:
        where = "in memory" if path is None else f"in {path}"
        self.args = (
            f"The influence {where} is unfinished: {done} of {shards} shards are done. Call "
            "attribute again with the same arguments to resume.",
        )


class DifferentInfluence(BacktrailError, ValueError):
    """A folder holds an influence with other arguments, which this call cannot resume."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        self.args = (
            f"{path} holds another influence ({differing(differences)}). Use the same arguments to "
            "resume it, choose another folder, or delete this one.",
        )


class FolderTaken(BacktrailError, FileExistsError):
    """The folder for a new influence is not empty."""

    def __init__(self, path: Path) -> None:
        self.args = (
            f"{path} already exists and is not empty. Choose another folder, or delete this one.",
        )


class IllFormedInfluence(BacktrailError, ValueError):
    """The arrays and the description of an influence do not fit together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.args = (f"Invalid influence: {'; '.join(problems)}.",)


def differing(differences: Mapping[str, tuple[object, object]]) -> str:
    """Name each setting that differs, with both values.

    >>> differing({"seed": (0, 1)})
    'seed: 0 in the folder, 1 now'
    """
    return "; ".join(
        f"{name}: {old!r} in the folder, {new!r} now" for name, (old, new) in differences.items()
    )
