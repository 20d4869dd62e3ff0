"""Which training samples have a wrong label: rankings by suspicion, and the list to review.

Nothing here changes the data. In every ranking a higher score is more suspicious.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import polars as pl
import torch
from jaxtyping import Float64

from backtrail import arguments
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
from backtrail.methods.observe import ObservedAt, check_run
from backtrail.queries import Loss
from backtrail.run.files import replacing
from backtrail.run.run import Run
from backtrail.task.task import Rows, in_eval_mode
from backtrail.tree import cast, flat_rows

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
    check_run(run)
    _check(method, validation=validation, window=window, out=out)
    if window is not None:
        window = arguments.step_range("window", window, run.steps)
    file = None if out is None else arguments.file("out", out, tuple(WRITERS))
    run.check_kept_steps()
    states = tuple(chosen_states(run, checkpoints))
    asked = _Asked(run, states, validation, window)
    if method == "held-out":
        crossed = cross(run, states, folds=min(FOLDS, run.samples))
        scores = (crossed.out + crossed.inside) / 2
        chances = crossed.chances
    else:
        if isinstance(method, Influence):
            scores = asked.harm_of(method)
        else:
            scores = RANKINGS[method](asked)
        chances = _chances(run, states)
    not_finite = run.ids[~np.isfinite(scores)].tolist()
    if not_finite:
        raise NotFinite(not_finite, scored=True)
    table = _listed(run, scores, chances)
    if file is not None:
        with replacing(file) as scratch:
            WRITERS[file.suffix](table, scratch)
    return table


@exclusive
def gradient_sizes(run: Run, states: Sequence[int]) -> Float64[np.ndarray, " sample"]:
    r"""TracIn's self-influence of every sample, with one gradient descent step at each state.

    .. math:: \sum_t \eta_t \lVert \nabla \ell_j(\theta_t) \rVert^2

    with every parameter group's own rate, as the step from that state used it.
    """
    total: np.ndarray = np.sum([_sizes_at(run, state) for state in states], axis=0)
    return total


def _sizes_at(run: Run, state: int) -> Float64[np.ndarray, " sample"]:
    """The terms of the sum over states."""
    point = point_at(run, state)
    row_gradients = RowGradients(run.task, point)
    like = next(iter(point.params.values()))
    # Every row of a piece has a whole gradient in memory.
    gradient_bytes = sum(tensor.nbytes for tensor in point.trained.values())
    rows_at_once = max(1, min(ROWS, CACHE // gradient_bytes))
    sizes = np.zeros(run.samples)
    first = True
    with in_eval_mode(run.task):
        for places, slots, read in pieces(run, rows=rows_at_once):
            batch = cast(read, like.dtype, like.device)
            if first:
                row_gradients.refuse_coupled(batch)
                first = False
            gradients = row_gradients.each(batch, point.trained)
            squares = {}
            for name, gradient in gradients.items():
                squares[name] = flat_rows(gradient).square().sum(1)
            # Every parameter has the learning rate of its group.
            total = torch.zeros_like(next(iter(squares.values())))
            for scaled in point.scaled(squares).values():
                total = total + scaled
            sizes[places] = total[slots].double().cpu().numpy()
    return sizes


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
        rows = self.validation
        if rows is None:
            if self.run.has_ids:
                raise BadSetting(
                    "validation",
                    None,
                    "rows with correct labels, since the rows of this run cannot be read by number",
                )
            rows = self.run.task.data
        states: ObservedAt = "end"
        if self.window is not None:
            # A window may begin at state 0, where all influence is zero.
            states = [state for state in self.window if state > 0]
        mean_loss = Loss(rows, aggregate="mean")
        influence = method.attribute(self.run, mean_loss, observed_at=states)
        return self.harm_of(influence)

    def harm_of(self, influence: Influence) -> Suspicion:
        """Negative influence, averaged over queries: at the end of training, or on a window."""
        influence.check_run(self.run)
        if self.window is None:
            start, stop = 0, influence.observed_at[-1]
        else:
            start, stop = self.window
        mean = influence.window(start, stop).mean(axis=0)
        # Not -mean: a sample without influence has the score 0, not -0.
        harm: np.ndarray = 0.0 - mean
        return harm


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
    known = get_args(Method)
    if not is_influence and not (isinstance(method, str) and method in known):
        names = ", ".join(repr(name) for name in known)
        raise BadSetting("method", method, f"{names}, or an Influence")
    shown = "Influence" if is_influence else repr(method)
    call = f"find_mislabeled(method={shown})"
    takes = ["checkpoints", "out"]
    if is_influence or method in {"dit", "dve"}:
        takes.append("window")
    if method in {"dit", "dve"}:
        takes.append("validation")
    if validation is not None and "validation" not in takes:
        raise UnusedOption("validation", validation, call=call, takes=takes)
    if window is not None and "window" not in takes:
        raise UnusedOption("window", window, call=call, takes=takes)
    if window is not None:
        expected = "two states (a, b) with a < b"
        start, stop = arguments.pair("window", window, expected)
        if not start < stop:
            raise BadSetting("window", window, expected)
    if out is not None:
        arguments.file("out", out, tuple(WRITERS))
    if validation is not None:
        expected = "one or more rows with correct labels, or None"
        if not arguments.count_rows("validation", validation, expected):
            raise BadSetting("validation", validation, expected)


def _chances(run: Run, states: Sequence[int]) -> Float64[np.ndarray, "sample label"] | None:
    """Probabilities of the classes, averaged over states; None where there are no classes."""
    classes = class_count(run)
    if not classes:
        return None
    # Summed one by one: the probabilities of all states together may not fit in memory.
    mean = np.zeros((run.samples, classes))
    for state in states:
        mean += probabilities(outputs(run, state)) / len(states)
    return mean


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
    given = labels(run)
    others = chances.copy()
    np.put_along_axis(others, given[:, None], -np.inf, 1)
    suggested = others.argmax(axis=1)
    return table.with_columns(
        pl.Series("label", given[order]),
        pl.Series("suggested", suggested[order], pl.Int64),
    )
