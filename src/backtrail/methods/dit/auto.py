"""The choice of `curvature="auto"`: the rules of a sweep that predict removals best on this run."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float

from backtrail import stats
from backtrail.curvature.policies import GaussNewton, Hessian
from backtrail.influence.tables import places
from backtrail.methods.retrain.retrain import Denominator, retrain
from backtrail.optim.slopes import Secant, Tangent, UpdateDerivative
from backtrail.queries import Query
from backtrail.queries.subset import evenly_spaced
from backtrail.run.run import Run
from backtrail.step.optimizers import rule_named
from backtrail.sweep.rules import Rules

log = logging.getLogger(__name__)
Predict = Callable[[Rules, Query], Float[np.ndarray, "query sample"]]

# Queries, single removals and removals of groups that are measured: one stack of re-runs.
QUERIES = 4
SINGLES = 30
GROUPS = 32
# A group is this share of the samples seen.
GROUP_SHARE = 20  # 1 / 20
# Not a seed that users are likely to draw their own removals with, which would then be no test of
# the choice.
SEED = 2412
# A later candidate has to be better by more than this.
MARGIN = 0.02


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The rules chosen, and the reason in one sentence."""

    rules: Rules
    reason: str


def candidate_rules(run: Run, slope: UpdateDerivative) -> list[Rules]:
    """List the rules that are compared, the exact ones first.

    Secants are among them where they differ from tangents and no other slope is asked for. The
    empirical Fisher matrix and no curvature at all never came first in our measurements.
    """
    slopes = [slope]
    linear = rule_named(run.manifest.optimizer).linear
    if slope == Tangent() and not linear:
        slopes.append(Secant())
    candidates = []
    for each in slopes:
        candidates.append(Rules(Hessian(), each))
        candidates.append(Rules(GaussNewton(), each))
    return candidates


def choose_rules(
    run: Run,
    queries: Query,
    candidates: Sequence[Rules],
    *,
    predict: Predict,
    state: int,
    denominator: Denominator,
) -> Choice:
    """Leave out single samples and groups of 5 %, and take the rules that predict this best.

    The figure of a candidate is the mean of its Pearson correlation with the single removals and
    its linear datamodelling score with the groups, over at most `QUERIES` of the queries.

    Args:
        run: The training.
        queries: Those that are to be attributed.
        candidates: The rules to choose from, the preferred ones first.
        predict: From rules and queries to the influence of every sample.
        state: The state that the queries read.
        denominator: What a removal does to its batch's mean.
    """
    some = evenly_spaced(queries, QUERIES)
    removals, singles = _removals(run)
    # Ground truth: what the queries gain, [query, state, removal], here at one state.
    actual = retrain(run, some, removals, observed_at=state, denominator=denominator).change[:, 0]
    # Ids of samples need not count from 0.
    columns = [np.asarray(places(run.ids, group)) for group in removals]
    figures = []
    for rules in candidates:
        predicted = predict(rules, some)
        figures.append(_agreement(predicted, columns, actual=actual, singles=singles))
    chosen = _first_near_best(figures)
    measured = []
    for rules, figure in zip(candidates, figures, strict=True):
        measured.append(f"{describe_rules(rules)} {figure:.2f}")
    reason = (
        f"agreement with {singles} samples and {GROUPS} groups of {len(removals[-1])} left out: "
        + "; ".join(measured)
    )
    log.info("chose %s by %s", describe_rules(candidates[chosen]), reason)
    return Choice(candidates[chosen], reason)


def _removals(run: Run) -> tuple[list[list[int]], int]:
    """Draw the removals, single samples first, and say how many of those there are."""
    draw = np.random.default_rng(SEED)
    singles = draw.choice(run.seen, min(SINGLES, len(run.seen)), replace=False)
    size = max(1, len(run.seen) // GROUP_SHARE)
    removals = [[int(sample)] for sample in singles]
    for _ in range(GROUPS):
        group = draw.choice(run.seen, size, replace=False)
        removals.append([int(sample) for sample in group])
    return removals, len(singles)


def _agreement(
    total: Float[np.ndarray, "query sample"],
    columns: Sequence[np.ndarray],
    *,
    actual: Float[np.ndarray, "query removal"],
    singles: int,
) -> float:
    """Mean of Pearson with single removals and LDS with groups; no correlation counts as zero."""
    predicted = stats.group_sums(total, columns[:singles])
    single = stats.pearson(predicted, actual[:, :singles])
    grouped = stats.lds(total, columns[singles:], actual[:, singles:])
    return float(np.nan_to_num([single, grouped]).mean())


def _first_near_best(figures: Sequence[float]) -> int:
    # Figures have sampling error, so the preferred candidates keep their place up to the margin.
    best = max(figures)
    return next(place for place, figure in enumerate(figures) if figure >= best - MARGIN)


def describe_rules(rules: Rules) -> str:
    """Name the classes of curvature and slope.

    >>> describe_rules(Rules(GaussNewton(), Secant()))
    'GaussNewton, Secant'
    """
    return f"{type(rules.curvature).__name__}, {type(rules.slope).__name__}"
