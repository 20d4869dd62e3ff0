"""When data matters: the regimes of a run, and in which of them it is worth to select data."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from backtrail.errors import BadSetting, ImpossibleWindow, NoRegimes
from backtrail.exclusive import exclusive
from backtrail.influence.analysis.regimes import Regimes, regimes_from_rates
from backtrail.influence.influence import Influence, ObservedState
from backtrail.methods.retrain.retrain import perturb
from backtrail.methods.retrain.weights import Steps, keep_only
from backtrail.queries import Query
from backtrail.run.manifest import Manifest
from backtrail.run.run import Run
from backtrail.step.state import Step

COLUMNS = "range", "share", "dropped", "loss", "change", "random"
Ranges = Mapping[str, Sequence[Steps]]


@exclusive
def regimes(
    run: Run,
    influence: Influence,
    *,
    observed_at: ObservedState = "end",
    query: int | str | None = None,
    ratio: float = 2.0,
) -> Regimes:
    r"""How much data matters at every step, whatever the learning rate, and the three regimes of it.

    .. math:: v_t = \frac{|S_t|}{\eta_t} \operatorname{mean}_{q,b} |I[q, \tau, t, b]|

    The learning rate η is divided out because a step is proportional to it, and :math:`|S_t|` is
    multiplied because a mean loss has divided by it: then v is that of a sample which is a batch by
    itself, whatever the size of its batch. (Where the task's loss is a sum, v is that of the whole
    batch.) Of several parameter groups, η is the mean over all entries of the parameters.

    The regimes are the three constant levels that fit :math:`\log v` best by least squares, over
    all pairs of boundaries. There are three regimes, `found`, where the first and the last level
    are both at least `ratio` times the one between, and the three explain at least half of the
    variance. The rule knows no chance and no unit; what it calls start and end may be of any
    length, so look at the picture, :func:`backtrail.plot.regimes`.

    Steps with learning rate 0, as a warm-up may begin with, have no v; they are left out and
    counted, as are steps without any influence.

    Args:
        run: the recorded training.
        influence: made from it, by any method.
        observed_at: state that the queries read; "end" is the last observed one.
        query: for this one only; by default the mean is over all.
        ratio: how many times the basin's level the other two must be.

    Raises:
        OtherRun: the influence is of another run.
    """
    influence.check_run(run)
    rates = learning_rates(run.manifest, run.log)
    return regimes_from_rates(influence, rates, observed_at=observed_at, query=query, ratio=ratio)


def learning_rates(manifest: Manifest, log: Iterable[Step]) -> Float64[np.ndarray, " step"]:
    """The learning rate of every step; of several parameter groups, the mean over all entries of the parameters."""
    entries = [
        sum(int(np.prod(manifest.params[name].shape)) for name in group)
        for group in manifest.groups
    ]
    rates = [[settings["lr"] for settings in step.settings] for step in log]
    return np.average(np.array(rates, dtype=np.float64), axis=1, weights=entries)


@exclusive
def worth_selecting(
    run: Run,
    influence: Influence,
    queries: Query,
    *,
    ranges: Ranges | None = None,
    drop: float = 0.1,
    seed: int = 0,
) -> pl.DataFrame:
    r"""In which part of training it is worth to select data: trained again with the harmful slots left out there.

    In each step of a range, the k slots with the most negative influence (the mean over the
    influence's queries) are left out: a share `drop` of the batch, and never one that did good. The
    others share their weight, so that a step is as long as it was:

    .. math:: w_{t,b} = 0 \;\text{ if left out, else }\; |S_t| / (|S_t| - k_t).

    Every range is trained again beside the training as it was, in float64, and compared with as
    many slots of the same steps drawn at random.

    Three limits. The influence is that of the training as it was: it does not know what was left
    out before. It is a derivative: leaving out half of every batch is no small change, and can do
    harm where leaving out little helps. And a score that chose the data is no judge of it: give
    `queries` on other rows than those of the influence.

    Args:
        run: the recorded training.
        influence: what to select by, on losses of validation rows.
        queries: what to compare, on losses of other rows; the mean of them is told.
        ranges: name of each range, and the stretches [first, stop) that it consists of. By default
            those of the regimes: always, start + end, and each alone.
        drop: largest share of a step's slots that is left out, rounded down: of 8 slots, a tenth is
            none.
        seed: of the random choice.

    Returns:
        One row per range, after that of selecting never: range, share (of all steps), dropped
        (slots), loss (mean of the queries after the training), change (against never), and random
        (the change with as many slots drawn at random).

    Raises:
        OtherRun: the influence is of another run.
        BadSetting: `drop` is not between 0 and 1, or there is no range.
        NoRegimes: no ranges are given, and the run has no three regimes.
        ImpossibleWindow: a stretch does not lie within the training.
    """
    influence.check_run(run)
    if not 0 < drop < 1:
        raise BadSetting("drop", drop, "0 < drop < 1")
    if ranges is not None and not ranges:
        raise BadSetting(
            "ranges", ranges, "None, or at least one range by name, like {'first tenth': [(0, 40)]}"
        )
    chosen = of_regimes(regimes(run, influence)) if ranges is None else ranges
    within = [_within(stretches, run.steps) for stretches in chosen.values()]
    harmful = _most_harmful(influence, drop)
    drawn = np.where(
        influence.sample >= 0, np.random.default_rng(seed).random(influence.sample.shape), np.inf
    )
    chance = _lowest(drawn, harmful.sum(axis=1))
    left_out = [which & steps[:, None] for which in (harmful, chance) for steps in within]
    real = influence.sample >= 0
    changes = [keep_only(real & ~gone, real) for gone in left_out]
    found = perturb(run, queries, changes, observed_at=(run.steps,))
    change, by_chance = np.split(found.change[:, 0].mean(axis=0), 2)
    table = pl.DataFrame(
        {
            "range": ["never", *chosen],
            "share": [0.0, *(float(steps.mean()) for steps in within)],
            "dropped": [0, *(int(gone.sum()) for gone in left_out[: len(within)])],
            "change": [0.0, *change],
            "random": [0.0, *by_chance],
        }
    )
    loss = (pl.col("change") + float(found.base.mean())).alias("loss")
    return table.with_columns(loss).select(*COLUMNS)


def of_regimes(found: Regimes) -> Ranges:
    """All of the training, its two ends, and each regime alone.

    Raises:
        NoRegimes: there are no three.
    """
    if not found.found:
        raise NoRegimes(found)
    start, basin, end = zip(found.edges[:-1], found.edges[1:], strict=True)
    both = {"always": [start, basin, end], "start + end": [start, end]}
    return {**both, "start": [start], "basin": [basin], "end": [end]}


def _within(stretches: Sequence[Steps], steps: int) -> Bool[np.ndarray, " step"]:
    inside = np.zeros(steps, dtype=bool)
    for a, b in stretches:
        if not 0 <= a <= b <= steps:
            raise ImpossibleWindow(a, b, steps)
        inside[a:b] = True
    return inside


def _most_harmful(influence: Influence, drop: float) -> Bool[np.ndarray, "step slot"]:
    """The most harmful slots of every step: a share of them, and none that did good."""
    scores = np.concatenate(
        [
            influence.values(start, stop)[:, -1].mean(axis=0, dtype=np.float64)
            for start, stop in influence.description.shards
        ]
    )
    real = influence.sample >= 0
    most = (drop * real.sum(axis=1)).astype(np.int64)
    return _lowest(
        np.where(real, scores, np.inf), np.minimum(most, (real & (scores < 0)).sum(axis=1))
    )


def _lowest(
    scores: Float64[np.ndarray, "step slot"], counts: Int64[np.ndarray, " step"]
) -> Bool[np.ndarray, "step slot"]:
    """The lowest few scores of every step; of equals the first slots."""
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    return ranks < counts[:, None]
