"""Which rules of a sweep predict removals best, measured on the user's own run."""

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
from backtrail.optim.slopes import Secant, Slope, Tangent
from backtrail.queries import Query
from backtrail.queries.subset import evenly_spaced
from backtrail.run.run import Run
from backtrail.step.update import LINEAR
from backtrail.sweep.rules import Rules

log = logging.getLogger(__name__)
Predict = Callable[[Rules, Query], Float[np.ndarray, "query sample"]]

ASKED = 4  # queries that the measurement asks
ONES, GROUPS, SHARE = (
    30,
    32,
    20,
)  # single removals, and groups of 1 / SHARE of the samples: one stack of re-runs
# not one that users are likely to draw their own removals with, which would then be no test of the
# choice
SEED = 2412
MARGIN = 0.02  # a later candidate has to be better by more than this


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The rules chosen, and why in one sentence."""

    rules: Rules
    why: str


def candidates(run: Run, slope: Slope) -> list[Rules]:
    """What is compared, the exact first; secants only where they differ and no other slope was asked for.

    The empirical Fisher matrix and no curvature at all never came first in our measurements.
    """
    bends = run.manifest.optimizer not in LINEAR and slope == Tangent()
    slopes = [slope, Secant()] if bends else [slope]
    return [Rules(curvature, steep) for steep in slopes for curvature in (Hessian(), GaussNewton())]


def choose(
    run: Run,
    queries: Query,
    rules: Sequence[Rules],
    *,
    predict: Predict,
    state: int,
    denominator: Denominator,
) -> Choice:
    """Leave out single samples and groups of 5 %, and take the rules whose predictions agree best.

    Each candidate's figure is the mean of its Pearson correlation with the single removals and its
    linear datamodelling score with the groups, over at most `ASKED` of the queries.

    Args:
        run: the training.
        queries: what will be asked.
        rules: the candidates, the preferred first.
        predict: from rules and queries to the influence of every sample.
        state: the state that the queries read.
        denominator: what a removal does to its batch's mean.
    """
    some, draw = evenly_spaced(queries, ASKED), np.random.default_rng(SEED)
    ones = draw.choice(run.seen, min(ONES, len(run.seen)), replace=False)
    size = max(1, len(run.seen) // SHARE)
    groups = [draw.choice(run.seen, size, replace=False) for _ in range(GROUPS)]
    removals = [[int(one)] for one in ones] + [
        [int(sample) for sample in group] for group in groups
    ]
    actual = retrain(run, some, removals, observed_at=state, denominator=denominator).change[:, 0]
    columns = [
        np.asarray(places(run.ids, group)) for group in removals
    ]  # ids need not count from 0
    figures = [
        _figure(predict(rule, some), columns, actual=actual, ones=len(ones)) for rule in rules
    ]
    best = int(np.argmax(figures))
    chosen = next(place for place, figure in enumerate(figures) if figure >= figures[best] - MARGIN)
    tried = "; ".join(
        f"{told(rule)} {figure:.2f}" for rule, figure in zip(rules, figures, strict=True)
    )
    why = f"agreement with {len(ones)} samples and {GROUPS} groups of {size} left out: {tried}"
    log.info("chose %s by %s", told(rules[chosen]), why)
    return Choice(rules[chosen], why)


def _figure(
    total: Float[np.ndarray, "query sample"],
    removals: Sequence[np.ndarray],
    *,
    actual: np.ndarray,
    ones: int,
) -> float:
    """Mean of Pearson with single removals and LDS with groups; no correlation counts as none."""
    single = stats.pearson(stats.group_sums(total, removals[:ones]), actual[:, :ones])
    many = stats.lds(total, removals[ones:], actual[:, ones:])
    return float(np.nan_to_num([single, many]).mean())


def told(rules: Rules) -> str:
    """Like `GaussNewton, Secant`.

    >>> told(Rules(GaussNewton(), Secant()))
    'GaussNewton, Secant'
    """
    return f"{type(rules.curvature).__name__}, {type(rules.slope).__name__}"
