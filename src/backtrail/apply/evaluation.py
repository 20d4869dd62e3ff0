"""Evaluate scores: against retraining, and in finding samples that are known to be wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Float64

from backtrail import arguments, stats
from backtrail.apply.trust import draw_visited
from backtrail.errors import BadSetting, NotObserved, WithoutQueries
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.tables import places
from backtrail.methods.observe import check_queries, check_run
from backtrail.methods.retrain.retrain import Denominator, Retrained, retrain
from backtrail.queries import Query
from backtrail.run.run import Run
from backtrail.stats import Interval, Statistic

Scores = Float64[np.ndarray, "query sample"]
# A training again for each: more is a mistake.
MOST_GROUPS = 100_000
Truth = Callable[[Sequence[Sequence[int]]], Retrained]
ONE_BY_ONE: dict[str, Statistic] = {
    "Pearson": stats.pearson,
    "Spearman": stats.spearman,
    "slope": stats.slope,
}
FINDING = {
    "AUC": stats.auc,
    "average precision": stats.average_precision,
    "precision": stats.precision_at,
}
SCHEMA = {
    "method": pl.String,
    "measure": pl.String,
    "removed": pl.Int64,
    "reruns": pl.Int64,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}


@exclusive
def evaluate(
    run: Run,
    influence: Influence | Mapping[str, Influence | Scores],
    queries: Query | None = None,
    *,
    wrong: Sequence[int] | None = None,
    removals: int = 32,
    shares: Sequence[float] = (0.05,),
    groups: int = 32,
    seed: int = 0,
    bank: str | Path | None = None,
) -> pl.DataFrame:
    r"""Measure how good influence is: against retraining, and in finding samples known to be wrong.

    Samples removed one at a time: Pearson correlation, Spearman correlation and slope of the actual
    over the predicted change of each query at the end of training. Samples removed in random
    groups: the linear datamodelling score (LDS; Park et al., 2023, arXiv 2303.14186), the Spearman
    correlation of the actual change with the sum of the group's scores. Each is the mean over
    queries, with its 95 % bootstrap interval over removals. All methods are judged on the same
    removals.

    Samples known to be wrong: how well the most harmful samples are those. AUC, average precision,
    and precision at their true number, of the mean over queries, with bootstrap intervals over
    samples.

    Ground truth is computed by the replay engine, in float64, with the denominator of the
    influence. With a bank the re-runs are made once: later calls, with other methods or other
    queries, read them.

    Args:
        run: The recorded training.
        influence: The result to judge, or several by name; or arrays of scores `[query, sample]` in
            backtrail's sign (what the query gains when the sample is removed), samples in the order
            of `run.ids`.
        queries: The queries of the influence; needed where it was opened from disk, or is an array.
        wrong: Samples known to be wrong, for example mislabelled on purpose.
        removals: Number of samples that are removed one at a time; 0 for none.
        shares: Shares of the samples seen in training that are removed together, each above 0 and
            below 1.
        groups: Number of random groups of each share; 0 for none.
        seed: Of all random choices.
        bank: Folder in which re-runs are stored and found again; see :func:`backtrail.retrain`.

    Returns:
        One row per method and measure: method, measure, removed (samples at a time), reruns (number
        of trainings behind the measure), estimate, low, high.

    Raises:
        OtherRun: An influence belongs to another run.
        WithoutQueries: The queries are not known, or are not those of an influence.
        NotObserved: An influence was not observed at the end of training.
        BadSetting: An option has a value that it cannot take; scores have another shape, or are not
            finite; or influences have different denominators, which one removal cannot judge.
    """
    check_run(run)
    if queries is not None:
        check_queries(queries)
    seed = arguments.seed("seed", seed)
    arguments.folder_or_none("bank", bank)
    named: dict[str, Influence | Scores]
    if isinstance(influence, Influence):
        named = {influence.method: influence}
    else:
        expected = "an Influence, or several by name"
        named = dict(arguments.instance("influence", influence, Mapping, expected))  # type: ignore[type-abstract]
        if not named:
            raise BadSetting("influence", influence, expected)
    influences = [found for found in named.values() if isinstance(found, Influence)]
    asked = _queries(queries, influences)
    for found in influences:
        _check(run, found, asked)
    denominator = _denominator(influences)
    shape = (len(asked.names), len(run.ids))
    scores = {name: _scores(found, name=name, shape=shape) for name, found in named.items()}
    truth = partial(retrain, run, asked, denominator=denominator, bank=bank)
    rows: list[Row] = []
    for trial in _trials(run, truth, removals=removals, shares=shares, groups=groups, seed=seed):
        rows += trial.judged(scores)
    if wrong is not None:
        guilty = np.zeros(len(run.ids), dtype=bool)
        guilty[places(run.ids, wrong)] = True
        if not 0 < guilty.sum() < len(guilty):
            raise BadSetting("wrong", wrong, "some samples of the training set, not all, or None")
        rows += _finding(scores, guilty, seed=seed)
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


Row = tuple[str, str, int, int, float, float, float]


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """Groups of samples left out, and how the queries changed.

    Attributes:
        measures: how predicted and actual changes are compared, by name.
        groups: places of the samples left out together.
        actual: change of every query, `[query, removal]`.
    """

    measures: Mapping[str, Statistic]
    groups: list[np.ndarray]
    actual: Float[np.ndarray, "query removal"]

    def judged(self, scores: Mapping[str, Scores]) -> Iterator[Row]:
        """A row for every method and measure."""
        removed = len(self.groups[0])
        reruns = len(self.groups)
        for name, found in scores.items():
            predicted = stats.group_sums(found, self.groups)
            for measure, statistic in self.measures.items():
                interval = stats.bootstrap(statistic, predicted, self.actual)
                yield (name, measure, removed, reruns, *_ends(interval))


def _trials(
    run: Run, truth: Truth, *, removals: int, shares: Sequence[float], groups: int, seed: int
) -> Iterator[Trial]:
    """Remove samples one by one, then groups of every share.

    Raises:
        BadSetting: a share is out of range, or there are too few removals for a correlation.
    """
    expected = "0 for none, or an integer of at least 2"
    removals = arguments.whole("removals", removals, least=0, expected=expected)
    most = f"0 for none, or an integer from 2 to {MOST_GROUPS}"
    groups = arguments.whole("groups", groups, least=0, most=MOST_GROUPS, expected=most)
    if removals == 1:
        raise BadSetting("removals", removals, expected)
    if groups == 1:
        raise BadSetting("groups", groups, most)
    # Everything is drawn first, so that a wrong setting is refused before any training.
    planned: list[tuple[Mapping[str, Statistic], list[list[int]]]] = []
    if removals:
        single = draw_visited(run, removals, seed=seed)
        planned.append((ONE_BY_ONE, [[sample] for sample in single]))
    some = "one or more shares, each above 0 and below 1"
    listed = [
        arguments.real("shares", share, some, lambda number: 0 < number < 1)
        for share in arguments.items("shares", shares, some)
    ]
    for share in listed:
        size = max(1, round(share * len(run.seen)))
        generator = np.random.default_rng((seed, size))
        drawn = []
        for _ in range(groups):
            group = generator.choice(run.seen, size, replace=False)
            drawn.append(sorted(group.tolist()))
        if drawn:
            planned.append(({f"LDS, {share:.0%}": stats.spearman}, drawn))
    for measures, removed in planned:
        actual = truth(removed).change[:, -1]
        group_places = [np.array(places(run.ids, group)) for group in removed]
        yield Trial(measures, group_places, actual)


def _finding(
    scores: Mapping[str, Scores], guilty: Bool[np.ndarray, " sample"], *, seed: int
) -> Iterator[Row]:
    """How well harmful scores find wrong samples; the interval is a bootstrap over samples."""
    generator = np.random.default_rng(seed)
    resamples = generator.integers(len(guilty), size=(1000, len(guilty)))
    count = int(guilty.sum())
    for name, found in scores.items():
        suspicion = -found.mean(0)
        for measure, statistic in FINDING.items():
            estimate = statistic(suspicion, guilty)
            again = [statistic(suspicion[chosen], guilty[chosen]) for chosen in resamples]
            # NaN where no wrong sample, or nothing else, was drawn.
            low, high = np.nanquantile(again, [0.025, 0.975])
            interval = Interval(estimate, float(low), float(high))
            yield (name, measure, count, 0, *_ends(interval))


def _queries(queries: Query | None, influences: Sequence[Influence]) -> Query:
    """The given queries, or else those of the first influence that has its own.

    Raises:
        WithoutQueries: there are none.
    """
    asked: object = queries
    if queries is None:
        known = [influence.query_object for influence in influences if influence.query_object]
        asked = known[0] if known else None
    if not isinstance(asked, Query):
        raise WithoutQueries(influences[0].queries if influences else ())
    return asked


def _denominator(influences: Sequence[Influence]) -> Denominator:
    """What the removals do to a batch's mean: as in the influences.

    Raises:
        BadSetting: they differ in it.
    """
    kinds: set[Denominator] = set()
    for influence in influences:
        kinds.add("keep" if influence.denominator == "keep" else "renormalize")
    if len(kinds) > 1:
        raise BadSetting("influence", sorted(kinds), "influences with the same denominator")
    return kinds.pop() if kinds else "keep"


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high


def _check(run: Run, found: Influence, asked: Query) -> None:
    """Refuse an influence that cannot be judged.

    Raises:
        OtherRun: it is of another run.
        WithoutQueries: it is of other queries.
        NotObserved: it does not see the end of training.
    """
    found.check_run(run)
    if asked.names != found.queries:
        raise WithoutQueries(found.queries)
    if found.observed_at[-1] != run.steps:
        raise NotObserved(run.steps, found.observed_at)


def _scores(found: Influence | Scores, *, name: str, shape: tuple[int, int]) -> Scores:
    """Scores of every sample at the end of training.

    Raises:
        BadSetting: scores of another shape, or not finite.
    """
    if isinstance(found, Influence):
        scores = found.total()[:, -1]
    else:
        scores = np.asarray(found)
        if scores.dtype.kind not in "fiu":
            raise BadSetting(f"influence[{name!r}]", found, "an Influence, or an array of scores")
    if scores.shape != shape:
        raise BadSetting(
            f"influence[{name!r}].shape", scores.shape, f"shape {shape}, [query, sample]"
        )
    not_finite = int((~np.isfinite(scores)).sum())
    if not_finite:
        raise BadSetting(
            f"influence[{name!r}]", f"{not_finite} scores that are not finite", "finite scores"
        )
    return scores.astype(np.float64)
