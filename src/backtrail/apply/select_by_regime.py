"""When data matters: the regimes of a run, and in which of them it is worth to select data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from backtrail import arguments
from backtrail.errors import BadSetting, NoRegimes
from backtrail.exclusive import exclusive
from backtrail.influence.analysis.regimes import Regimes, regimes_from_rates
from backtrail.influence.influence import Influence, ObservedState
from backtrail.methods.observe import check_queries, check_run
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
    r"""Size of the influence of every step, divided by its learning rate, and its three regimes.

    .. math:: v_t = \frac{|S_t|}{\eta_t} \operatorname{mean}_{q,b} |I[q, \tau, t, b]|

    The learning rate η is divided out because a step is proportional to it, and :math:`|S_t|` is
    multiplied because a mean loss has divided by it: v is then that of a sample which is a batch by
    itself, whatever the size of its batch. (Where the task's loss is a sum, v is that of the whole
    batch.) Of several parameter groups, η is the mean over all entries of the parameters.

    The regimes are the three constant levels that fit :math:`\log v` best by least squares, over
    all pairs of boundaries. There are three regimes, `found`, where the first and the last level
    are both at least `ratio` times the one between, and the three explain at least half of the
    variance. The rule uses no significance test; what it calls start and end may be of any length,
    so look at the plot, :func:`backtrail.plot.regimes`.

    Steps with learning rate 0, as at the start of a warm-up, have no v; they are left out and
    counted, as are steps without any influence.

    Args:
        run: The recorded training.
        influence: Computed from it, by any method.
        observed_at: State at which the queries are read; "end" is the last observed one.
        query: Index or name of a single query; by default the mean is over all.
        ratio: Factor by which the other two levels must exceed the basin's.

    Raises:
        OtherRun: The influence belongs to another run.
    """
    check_run(run)
    arguments.instance("influence", influence, Influence, "an influence of the run")
    influence.check_run(run)
    rates = learning_rates(run.manifest, run.log)
    return regimes_from_rates(influence, rates, observed_at=observed_at, query=query, ratio=ratio)


def learning_rates(manifest: Manifest, log: Iterable[Step]) -> Float64[np.ndarray, " step"]:
    """Learning rate of every step; with several parameter groups, the mean over all entries."""
    entries = []  # of each parameter group
    for group in manifest.groups:
        sizes = [int(np.prod(manifest.params[name].shape)) for name in group]
        entries.append(sum(sizes))
    rates = []
    for step in log:
        rates.append([settings["lr"] for settings in step.settings])
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
    r"""Train again with the harmful slots left out in parts of the training, to see where it helps.

    In each step of a range, the k slots with the most negative influence (mean over the influence's
    queries) are left out: a share `drop` of the batch, and never a slot with positive influence.
    The others share their weight, so that a step stays as long as it was:

    .. math:: w_{t,b} = 0 \;\text{ if left out, else }\; |S_t| / (|S_t| - k_t).

    Every range is trained again next to the training as it was, in float64, and compared with
    leaving out as many random slots of the same steps.

    Three limits. The influence is that of the training as it was: it does not include what was left
    out before. It is a derivative: leaving out half of every batch is no small change, and can do
    harm where leaving out little helps. And a score that selected the data cannot judge it: give
    `queries` on other rows than those of the influence.

    Args:
        run: The recorded training.
        influence: What to select by: influence on losses of validation rows.
        queries: What to compare: losses of other rows; the table has their mean.
        ranges: Name of each range, and the stretches [first, stop) that it consists of. By default
            those of the regimes: always, start + end, and each alone.
        drop: Largest share of a step's slots that is left out, rounded down: of 8 slots, a tenth is
            none.
        seed: Of the random slots.

    Returns:
        One row per range, after that of selecting never: range, share (of all steps), dropped
        (slots), loss (mean of the queries after the training), change (from never), and random (the
        change with as many random slots left out).

    Raises:
        OtherRun: The influence belongs to another run.
        BadSetting: `drop` is not between 0 and 1, or `ranges` is empty.
        NoRegimes: No ranges are given, and the run does not have three regimes.
        ImpossibleWindow: A stretch does not lie within the training.
    """
    check_run(run)
    arguments.instance("influence", influence, Influence, "an influence of the run")
    check_queries(queries)
    influence.check_run(run)
    drop = arguments.real("drop", drop, "0 < drop < 1", lambda share: 0 < share < 1)
    seed = arguments.seed("seed", seed)
    if ranges is not None and (not isinstance(ranges, Mapping) or not ranges):
        raise BadSetting(
            "ranges", ranges, "None, or at least one range by name, like {'first tenth': [(0, 40)]}"
        )
    if ranges is None:
        ranges = of_regimes(regimes(run, influence))
    within = [_within(stretches, run.steps) for stretches in ranges.values()]

    is_sample = influence.sample >= 0  # [step, slot]; the other slots pad short batches
    harmful = _most_harmful(influence, drop)
    generator = np.random.default_rng(seed)
    keys = np.where(is_sample, generator.random(influence.sample.shape), np.inf)
    random = _lowest(keys, harmful.sum(axis=1))

    # All trainings in one stack: every range without its harmful slots, then without random ones.
    changes = []
    for slots in (harmful, random):
        for steps in within:
            left_out = slots & steps[:, None]
            changes.append(keep_only(is_sample & ~left_out, is_sample))
    found = perturb(run, queries, changes, observed_at=(run.steps,))
    mean_change = found.change[:, 0].mean(axis=0)
    by_harmful, by_random = np.split(mean_change, 2)

    columns: dict[str, list[Any]] = {
        "range": ["never"],
        "share": [0.0],
        "dropped": [0],
        "change": [0.0],
        "random": [0.0],
    }
    for place, (name, steps) in enumerate(zip(ranges, within, strict=True)):
        columns["range"].append(name)
        columns["share"].append(float(steps.mean()))
        columns["dropped"].append(int(harmful[steps].sum()))
        columns["change"].append(float(by_harmful[place]))
        columns["random"].append(float(by_random[place]))
    table = pl.DataFrame(columns)
    loss = (pl.col("change") + float(found.base.mean())).alias("loss")
    return table.with_columns(loss).select(*COLUMNS)


def of_regimes(found: Regimes) -> Ranges:
    """All of the training, its two ends, and each regime alone.

    Raises:
        NoRegimes: the run does not have three regimes.
    """
    if not found.found:
        raise NoRegimes(found)
    start, basin, end = zip(found.edges[:-1], found.edges[1:], strict=True)
    return {
        "always": [start, basin, end],
        "start + end": [start, end],
        "start": [start],
        "basin": [basin],
        "end": [end],
    }


def _within(stretches: Sequence[Steps], steps: int) -> Bool[np.ndarray, " step"]:
    """Which steps lie in one of the stretches.

    Raises:
        ImpossibleWindow: a stretch does not lie within the training.
    """
    inside = np.zeros(steps, dtype=bool)
    expected = "a list of stretches (first, stop) by name"
    for stretch in arguments.items("ranges", stretches, expected):
        first, stop = arguments.step_range("ranges", stretch, steps)
        inside[first:stop] = True
    return inside


def _most_harmful(influence: Influence, drop: float) -> Bool[np.ndarray, "step slot"]:
    """The most harmful slots of every step: a share of its slots, and only harmful ones."""
    means = []
    # Shard by shard: the whole array may not fit in memory.
    for start, stop in influence.description.shards:
        values = influence.values(start, stop)[:, -1]
        means.append(values.mean(axis=0, dtype=np.float64))
    scores = np.concatenate(means)  # [step, slot]
    is_sample = influence.sample >= 0
    largest_count = (drop * is_sample.sum(axis=1)).astype(np.int64)
    harmful_count = (is_sample & (scores < 0)).sum(axis=1)
    counts = np.minimum(largest_count, harmful_count)
    return _lowest(np.where(is_sample, scores, np.inf), counts)


def _lowest(
    scores: Float64[np.ndarray, "step slot"], counts: Int64[np.ndarray, " step"]
) -> Bool[np.ndarray, "step slot"]:
    """The lowest scores of every step, so many as counted; of equal scores the first slots."""
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    return ranks < counts[:, None]
