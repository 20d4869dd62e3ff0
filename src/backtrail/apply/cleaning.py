"""Which training samples have a wrong label: rankings by suspicion, and the list to review.

Nothing here changes the data. In every ranking a higher score is more suspicious.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import polars as pl
from jaxtyping import Float64

from backtrail.apply.cross_validation import FOLDS, cross
from backtrail.apply.signals import (
    ROWS,
    class_count,
    el2n,
    labels,
    losses,
    margins,
    outputs,
    pieces,
    probabilities,
)
from backtrail.errors import BadSetting, NotFinite, UnusedOption
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.tables import ranking
from backtrail.methods.diff_in.diff_in import DiffIn
from backtrail.methods.diff_in.row_gradients import RowGradients
from backtrail.methods.diff_in.trajectory import chosen_states, point_at
from backtrail.methods.dit.dit import DIT
from backtrail.methods.dve.dve import DataValueEmbedding
from backtrail.methods.memory import CACHE
from backtrail.methods.observe import ObservedAt
from backtrail.queries import Loss
from backtrail.run.files import replacing
from backtrail.run.run import Run
from backtrail.task.task import Rows, in_eval_mode
from backtrail.tree import cast

Method = Literal[
    "mean-loss", "held-out", "margin", "el2n", "loss", "tracin", "self-influence", "dit", "dve"
]
Window = tuple[int, int]
Suspicion = Float64[np.ndarray, " sample"]
WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".csv": lambda table, path: table.write_csv(path),
    ".parquet": lambda table, path: table.write_parquet(path),
}


@exclusive
def find_mislabeled(
    run: Run,
    *,
    method: Method | Influence = "mean-loss",
    validation: Rows | None = None,
    window: Window | None = None,
    checkpoints: int | Sequence[int] = 10,
    out: str | Path | None = None,
) -> pl.DataFrame:
    """Rank the training samples by how likely their label is wrong.

    * "mean-loss": loss, averaged over checkpoints;
    * "held-out": the same distance as "el2n" (the loss, where there are no classes) in 20 re-runs
      of the training, half of it from those without the sample;
    * "margin": logit of the best other class minus that of the label, averaged over checkpoints;
    * "el2n": distance of the probabilities from the label (Paul et al., 2021, arXiv 2107.07075),
      averaged over checkpoints;
    * "loss": loss at the end;
    * "tracin": learning rate times squared gradient of the sample's own loss, summed over
      checkpoints (Pruthi et al., 2020, arXiv 2002.08484);
    * "self-influence": size of the published self-influence of `DiffIn`, over the checkpoints;
    * "dit": harm to the mean loss of the validation rows, or else of the training set, by `DIT`;
    * "dve": the same by `DataValueEmbedding`;
    * an `Influence`: its harm, averaged over its queries. Harm is negative influence.

    "margin" and "el2n" need a classification; the others read losses and gradients alone.

    Args:
        run: The recorded training.
        method: What to rank by.
        validation: Rows with correct labels; for "dit" and "dve".
        window: (a, b): Count only what samples did to the loss between these two states; for "dit",
            "dve" and an influence that was observed at both.
        checkpoints: How many states to average over, evenly spaced (among the stored ones, where
            there are some), or their numbers.
        out: File for the table, `.csv` or `.parquet`; an existing one is overwritten.

    Returns:
        All samples, the most suspicious first, with the columns rank, sample (a row number, or an
        id where samples have ids of their own), score, label, and suggested: the most probable of
        the other classes, averaged over the checkpoints, or over the re-runs without the sample. It
        is what the label may be if it is wrong, not a claim that it is. Label and suggested are
        null where the task is not a classification.

    Raises:
        BadSetting: An option has a value that it cannot take.
        UnusedOption: An option that the method does not use.
        NoClasses: The method compares classes, and the task has none.
        OtherRun: The influence belongs to another run.
        NotFinite: Some score is NaN or infinite.
    """
    _check(method, validation=validation, window=window, out=out)
    run.check_kept_steps()
    asked = _Asked(run, tuple(chosen_states(run, checkpoints)), validation, window)
    if method == "held-out":
        crossed = cross(run, asked.states, folds=min(FOLDS, run.samples))
        scores, chances = (crossed.out + crossed.inside) / 2, crossed.chances
    else:
        scores = asked.harm_of(method) if isinstance(method, Influence) else RANKINGS[method](asked)
        chances = _chances(run, asked.states)
    if unknown := run.ids[~np.isfinite(scores)].tolist():
        raise NotFinite(unknown, scored=True)
    table = _listed(run, scores, chances)
    if out is not None:
        with replacing(Path(out)) as scratch:
            WRITERS[Path(out).suffix](table, scratch)
    return table


@exclusive
def gradient_sizes(run: Run, states: Sequence[int]) -> Float64[np.ndarray, " sample"]:
    r"""TracIn's self-influence of every sample, with one gradient descent step at each state.

    .. math:: \sum_t \eta_t \lVert \nabla \ell_j(\theta_t) \rVert^2

    with every parameter group's own rate, as the step from that state used it.
    """
    found: np.ndarray = np.sum([_sizes_at(run, state) for state in states], axis=0)
    return found


def _sizes_at(run: Run, state: int) -> Float64[np.ndarray, " sample"]:
    point, found = point_at(run, state), np.zeros(run.samples)
    rows, like = RowGradients(run.task, point), next(iter(point.params.values()))
    size = sum(tensor.nbytes for tensor in point.trained.values())
    with in_eval_mode(run.task):
        for places, slots, read in pieces(run, rows=max(1, min(ROWS, CACHE // size))):
            gradients = rows.each(cast(read, like.dtype, like.device), point.trained)
            squares = {
                name: tensor.flatten(1).square().sum(1) for name, tensor in gradients.items()
            }
            found[places] = sum(point.scaled(squares).values())[slots].double().cpu().numpy()  # type: ignore[index]
    return found


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """What a ranking may read."""

    run: Run
    states: tuple[int, ...]
    validation: Rows | None
    window: Window | None

    def harm(self, method: DIT | DataValueEmbedding) -> Suspicion:
        """The harm to a mean loss, by a method of attribution.

        Raises:
            BadSetting: there are no rows to ask about.
        """
        if self.validation is None and self.run.has_ids:
            raise BadSetting(
                "validation",
                None,
                "rows with correct labels, since the rows of this run cannot be read by number",
            )
        rows = self.run.task.data if self.validation is None else self.validation
        states: ObservedAt = "end" if self.window is None else self.window
        return self.harm_of(
            method.attribute(self.run, Loss(rows, aggregate="mean"), observed_at=states)
        )

    def harm_of(self, influence: Influence) -> Suspicion:
        """Negative influence, averaged over queries: at the end of training, or on a window."""
        influence.check_run(self.run)
        last = influence.observed_at[-1]
        found: np.ndarray = 0.0 - influence.window(*(self.window or (0, last))).mean(
            axis=0
        )  # 0 - 0 has no sign
        return found


RANKINGS: dict[str, Callable[[_Asked], Suspicion]] = {
    "mean-loss": lambda asked: np.mean(
        [losses(asked.run, state) for state in asked.states], axis=0
    ),
    "margin": lambda asked: -margins(asked.run, asked.states),
    "el2n": lambda asked: el2n(asked.run, asked.states),
    "loss": lambda asked: losses(asked.run, asked.run.steps),
    "tracin": lambda asked: gradient_sizes(asked.run, asked.states),
    "self-influence": lambda asked: np.abs(DiffIn(asked.states).self_influence(asked.run)),
    "dit": lambda asked: asked.harm(DIT()),
    "dve": lambda asked: asked.harm(DataValueEmbedding()),
}


def _check(
    method: Method | Influence,
    *,
    validation: Rows | None,
    window: Window | None,
    out: str | Path | None,
) -> None:
    """Refuse settings that cannot be used, before any work is done.

    Raises:
        BadSetting: names the setting, and what it may be.
        UnusedOption: names the option, and those that the method takes.
    """
    is_influence = isinstance(method, Influence)
    if not is_influence and method not in get_args(Method):
        names = ", ".join(map(repr, get_args(Method)))
        raise BadSetting("method", method, f"{names}, or an Influence")
    call = f"find_mislabeled(method={'Influence' if is_influence else repr(method)})"
    takes = ["checkpoints", "out"]
    if is_influence or method in {"dit", "dve"}:
        takes.append("window")
    if method in {"dit", "dve"}:
        takes.append("validation")
    if validation is not None and "validation" not in takes:
        raise UnusedOption("validation", validation, call=call, takes=takes)
    if window is not None and "window" not in takes:
        raise UnusedOption("window", window, call=call, takes=takes)
    if window is not None and not window[0] < window[1]:
        raise BadSetting("window", window, "two states (a, b) with a < b")
    if out is not None and Path(out).suffix not in WRITERS:
        raise BadSetting("out", str(out), f"a file name that ends with {' or '.join(WRITERS)}")


def _chances(run: Run, states: Sequence[int]) -> Float64[np.ndarray, "sample label"] | None:
    """Probabilities of the classes, averaged over states; None where there are no classes."""
    if not class_count(run):
        return None
    return sum(probabilities(outputs(run, state)) / len(states) for state in states)  # type: ignore[return-value]


def _listed(
    run: Run, scores: Suspicion, chances: Float64[np.ndarray, "sample label"] | None
) -> pl.DataFrame:
    """The table, the most suspicious first."""
    order = ranking(scores, "helpful")
    ranks = np.arange(1, len(order) + 1)
    table = pl.DataFrame({"rank": ranks, "sample": run.ids[order], "score": scores[order]})
    if chances is None:
        none = pl.lit(None, pl.Int64)
        return table.with_columns(none.alias("label"), none.alias("suggested"))
    given, others = labels(run), chances.copy()
    np.put_along_axis(others, given[:, None], -np.inf, 1)
    return table.with_columns(
        pl.Series("label", given[order]),
        pl.Series("suggested", others.argmax(axis=1)[order], pl.Int64),
    )
