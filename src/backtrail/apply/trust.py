"""Whether to believe an influence: three checks, each measured on the user's own run.

Replay: the recording explains the training. Derivative: the sweep is the derivative of the
retrained query. Removal: the derivative predicts what happens when samples are really left out. The
second tests the arithmetic, the third also whether one sample is a small change for this training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float

from backtrail import stats
from backtrail.errors import ReplayMismatch, WithoutQueries, WrongData
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.tables import places
from backtrail.methods.result import precision
from backtrail.methods.retrain.retrain import Denominator, perturb, retrain
from backtrail.methods.retrain.weights import Perturbation
from backtrail.queries import Query
from backtrail.run.run import AUTOCAST, Run, Verification
from backtrail.stats import Interval

SIZES = (1e-3, 1e-4, 1e-5, 1e-6)  # of the nudge; the two whose answers agree best are believed
EXACT = {
    "float32": 5e-3,
    "float64": 1e-5,
}  # error of a passed derivative check, by precision of the sweep
KNOWN = 1e-2  # a derivative that retraining cannot tell better than this decides nothing
GOOD = 0.9  # Pearson of a passed removal check
CLOSE = 0.05  # to the best that an additive score can reach
RIGHT_SIZE = 1.5  # factor by which an approximation may miss the size of removals without a word
EARLY = 0.5  # share of the influence in step 0 that is worth a word


@final
@dataclass(frozen=True, slots=True)
class DerivativeCheck:
    r"""Influence against retraining with all sample weights moved by a tiny random amount.

    With a random direction d `[step, slot]` and a small size h, the change of each query is

    .. math:: \big(q(\theta(1 + h d)) - q(\theta(1 - h d))\big) / 2 h
        \;\approx\; -\sum_{t,b} d_{t,b} I[q, \tau, t, b]

    >>> check = DerivativeCheck(error=2e-7, uncertainty=1e-8, growth=3.0, allowed=1e-5)
    >>> check.passed
    True

    Attributes:
        error: Largest relative error over queries and observed states.
        uncertainty: Relative difference between two sizes h; the error is known no better.
        growth: Largest growth of the cotangents over the sweep; rounding errors grow with them.
        allowed: Error up to which the check passes, by the precision of the sweep.
    """

    error: float
    uncertainty: float
    growth: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within rounding, or within what retraining itself can tell."""
        return self.error <= max(self.allowed, 3 * min(self.uncertainty, KNOWN))

    def __str__(self) -> str:
        """One sentence."""
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"derivative  {verdict}: influence and retraining with slightly changed sample weights "
            f"differ by {self.error:.1e} (relative; uncertainty {self.uncertainty:.0e}); "
            f"cotangents grew {self.growth:.3g}-fold in the sweep"
        )


@final
@dataclass(frozen=True, slots=True, repr=False)
class RemovalCheck:
    """Predicted against actual change of the queries when samples are removed one at a time.

    Both are changes at the last observed state, in the unit of the queries: the query after the
    removal minus the query as it was.

    >>> import numpy as np
    >>> from backtrail.stats import Interval
    >>> effects = np.array([[0.1, -0.2]])
    >>> one = Interval(1.0, 1.0, 1.0)
    >>> RemovalCheck((3, 8), effects, effects, one, one, slope=1.0, noise=0.0).passed
    True

    Attributes:
        samples: The removed samples.
        predicted: Change by the influence, `[query, sample]`.
        actual: Change by retraining, `[query, sample]`.
        pearson: Pearson correlation, mean over queries, with its bootstrap interval over samples.
        spearman: Spearman rank correlation, likewise.
        slope: Slope of actual over predicted, mean over queries; 1 means the right size.
        noise: Largest difference of two unperturbed re-runs; smaller changes mean nothing.
        reachable: Pearson correlation of the actual changes with their own linear part, mean over
            queries: the best that any score additive over samples can be expected to reach. None
            where the batch's denominator is renormalised.
    """

    samples: tuple[int, ...]
    predicted: Float[np.ndarray, "query sample"]
    actual: Float[np.ndarray, "query sample"]
    pearson: Interval
    spearman: Interval
    slope: float
    noise: float
    reachable: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the correlation is good."""
        return self.pearson.estimate >= GOOD

    @property
    def exhausted(self) -> bool:
        """Whether it is about as good as any additive score can be."""
        return self.reachable is not None and self.pearson.estimate >= self.reachable - CLOSE

    def __str__(self) -> str:
        """One sentence."""
        verdict = "passed" if self.passed else "FAILED"
        reach = (
            ""
            if self.reachable is None
            else f"; best Pearson any additive score can reach: {self.reachable:.2f}"
        )
        return (
            f"removal     {verdict}: {len(self.samples)} samples left out one at a time: "
            f"Pearson {self.pearson}, Spearman {self.spearman}, slope {self.slope:.2f}, "
            f"noise floor {self.noise:.1e}{reach}"
        )

    def __repr__(self) -> str:
        """The main figures in one line; never the arrays."""
        return (
            f"RemovalCheck({len(self.samples)} samples, Pearson {self.pearson}, "
            f"slope {self.slope:.2f}, passed={self.passed})"
        )


@final
@dataclass(frozen=True, slots=True, repr=False)
class Trust:
    """What :func:`backtrail.trust` found: three checks of an influence on its own run.

    `print(result)` shows a line per check and what to make of them; `result.advice` is that last
    sentence alone.

    >>> import numpy as np
    >>> from backtrail.run.run import Verification
    >>> from backtrail.stats import Interval
    >>> one = Interval(1.0, 1.0, 1.0)
    >>> effects = np.array([[0.1, -0.2]])
    >>> removal = RemovalCheck((3, 8), effects, effects, one, one, slope=1.0, noise=0.0)
    >>> Trust(Verification(40, 2, 1e-7), None, removal, early=0.0).advice
    'Influence predicts removals on this run.'

    Attributes:
        replay: What the replay check found, or the sentence of its failure.
        derivative: The derivative check; None where the influence is not meant to be the derivative
            (another method than DIT, renormalised denominators, another curvature than the Hessian,
            a secant).
        removal: The removal check.
        early: Share of the absolute influence at the last observed state that comes from step 0.
        method: The method that computed the influence.
    """

    replay: Verification | str
    derivative: DerivativeCheck | None
    removal: RemovalCheck
    early: float
    method: str = "DIT"

    def __str__(self) -> str:
        """The checks, a line each, and what to make of them."""
        replayed = isinstance(self.replay, Verification)
        lines = [f"replay      {'passed' if replayed else 'FAILED'}: {self.replay}"]
        lines += [str(check) for check in (self.derivative, self.removal) if check is not None]
        return "\n".join([*lines, self.advice])

    def __repr__(self) -> str:
        """Which checks passed, in one line."""
        derivative = None if self.derivative is None else self.derivative.passed
        return (
            f"Trust({self.method}: replay={isinstance(self.replay, Verification)}, "
            f"derivative={derivative}, removal={self.removal.passed})"
        )

    @property
    def advice(self) -> str:
        """What the three checks mean together."""
        if not isinstance(self.replay, Verification):
            return "Do not use these scores: the recording does not reproduce the training."
        if self.derivative is not None and not self.derivative.passed:
            return "Do not use these scores: the sweep is not the derivative of this training."
        if self.method != "DIT":
            return self._advice_on_an_approximation()
        if not self.removal.passed and self.early > EARLY:
            return (
                f"{self.early:.0%} of the influence comes from step 0. Adam's first update is "
                "g / (|g| + eps): where a gradient is near zero, its derivative is huge and does not "
                "predict removals. Attribute again with DIT(slope=backtrail.Secant()); in the next "
                "training, use a warm-up or eps=1e-6."
            )
        if not self.removal.passed:
            return self._advice_on_rough_training()
        return "Influence predicts removals on this run."

    def _advice_on_rough_training(self) -> str:
        what = "The influence is" if self.derivative is None else "The derivative is correct, but"
        rough = (
            f"{what} a poor predictor of removals: at the scale of one sample this training is not "
            "smooth (ReLU with Adam, a large learning rate)."
        )
        if self.removal.exhausted:
            return (
                f"{rough} No additive score does much better: counting a sample twice does not have "
                "the opposite effect of leaving it out. Groups of samples are more reliable than "
                "single ones."
            )
        return (
            f'{rough} DIT(curvature="auto") measures whether another curvature or slope does better. '
            "Ranks are more reliable than sizes, and groups of samples more than single ones."
        )

    def _advice_on_an_approximation(self) -> str:
        if not self.removal.passed:
            return (
                f"{self.method} is a poor predictor of removals on this run. It ignores a part of the "
                "training that matters here (see its documentation). Attribute again with "
                "backtrail.DIT(), which ignores nothing, and check that result too."
            )
        size = self.removal.slope
        if not 1 / RIGHT_SIZE <= size <= RIGHT_SIZE:
            return (
                f"{self.method} ranks removals well on this run; their sizes are {size:.3g} times "
                "the predicted ones."
            )
        return f"{self.method} predicts removals on this run."


@exclusive
def trust(
    run: Run,
    influence: Influence,
    *,
    queries: Query | None = None,
    removals: int = 32,
    seed: int = 0,
) -> Trust:
    """Check an influence against its own run.

    Three checks: the recording replays; the influence is the derivative of the retrained query (for
    `DIT` with its defaults); and the influence predicts what happens when samples are removed.

    Args:
        run: The run that the influence was computed from.
        influence: The result to check.
        queries: The queries of the influence; needed where it was opened from disk.
        removals: Number of samples that are removed one at a time, a random choice of those that
            the training visited.
        seed: Of this choice, and of the direction of the derivative check.

    Returns:
        The three checks; `print` shows them with what to make of them.

    Raises:
        OtherRun: The influence belongs to another run.
        WithoutQueries: The influence was opened from disk and no queries were given, or other ones
            than it was computed for.
    """
    influence.check_run(run)
    asked = queries or influence.query_object
    if not isinstance(asked, Query) or asked.names != influence.queries:
        raise WithoutQueries(influence.queries)
    try:
        replay: Verification | str = run.verify()
    except (ReplayMismatch, WrongData) as mismatch:
        replay = str(mismatch)
    exact = influence.denominator == "keep" and influence.description.settings.get("exact", True)
    derivative = derivative_check(run, influence, asked, seed=seed) if exact else None
    samples = draw_visited(run, removals, seed=seed)
    removal = removal_check(run, influence, asked, samples=samples)
    return Trust(replay, derivative, removal, early_share(influence), influence.method)


@exclusive
def derivative_check(
    run: Run, influence: Influence, queries: Query, *, seed: int = 0
) -> DerivativeCheck:
    """Nudge all sample weights along one random direction, both ways, in float64, and compare."""
    drawn = np.random.default_rng(seed).standard_normal(influence.sample.shape)
    direction = torch.from_numpy(drawn)
    nudges = [
        Perturbation(direction=direction, size=sign * size)
        for size in SIZES
        for sign in (1.0, -1.0)
    ]
    found = perturb(run, queries, nudges, observed_at=influence.observed_at).change
    sizes = 2 * np.array(SIZES)
    slopes = (found[:, :, 0::2] - found[:, :, 1::2]) / sizes  # [query, observed_at, size]
    actual, uncertainty = steadiest(slopes)
    predicted = -np.einsum("qotb,tb->qo", influence.values().astype(np.float64), drawn)
    scale = np.abs(actual).max(axis=1, keepdims=True) + 1e-300
    errors, unknown = np.abs(predicted - actual) / scale, uncertainty / scale
    # A training under float16 is replayed without it, so sweep and re-run go along slightly
    # different states.
    coarse = any(step.autocast == "float16" for step in run.log)
    allowed = AUTOCAST if coarse else EXACT[precision(run)]
    return DerivativeCheck(
        float(errors.max()), float(unknown.max()), float(influence.growth.max()), allowed
    )


def early_share(influence: Influence) -> float:
    """Share of the absolute influence on the last observed state that stems from step 0."""
    whole, first = (np.abs(influence.values(0, stop)[:, -1]).sum() for stop in (None, 1))
    return float(first / whole) if whole > 0 else 0.0


def steadiest(slopes: Float[np.ndarray, "query observed_at size"]) -> tuple[np.ndarray, np.ndarray]:
    """Richardson value of the two neighbouring step sizes that agree best, and their difference."""
    gaps = np.abs(np.diff(slopes, axis=2))
    best = gaps.argmin(axis=2)[..., None]
    large, small = (np.take_along_axis(slopes, best + k, 2)[..., 0] for k in (0, 1))
    ratio = (SIZES[0] / SIZES[1]) ** 2
    return (ratio * small - large) / (ratio - 1), np.take_along_axis(gaps, best, 2)[..., 0]


@exclusive
def removal_check(
    run: Run, influence: Influence, queries: Query, *, samples: Sequence[int]
) -> RemovalCheck:
    """Retrain without each of the samples; compare with the total at the last observed state."""
    denominator: Denominator = "keep" if influence.denominator == "keep" else "renormalize"
    last = influence.observed_at[-1]
    found = retrain(run, queries, [[s] for s in samples], observed_at=last, denominator=denominator)
    actual, reachable = found.change[:, 0], None
    if denominator == "keep":
        doubled = retrain(
            run, queries, [[s] for s in samples], observed_at=last, weight=2.0
        ).change[:, 0]
        # What is linear in a sample's weight changes its sign where the sample is counted twice.
        reachable = stats.mean_over_queries(stats.pearson((actual - doubled) / 2, actual))
    predicted = influence.total()[:, -1][:, places(influence.ids, samples)]
    return RemovalCheck(
        tuple(samples),
        predicted,
        actual,
        stats.bootstrap(stats.pearson, predicted, actual),
        stats.bootstrap(stats.spearman, predicted, actual),
        stats.mean_over_queries(stats.slope(predicted, actual)),
        float(found.noise.max()),
        reachable,
    )


def draw_visited(run: Run, count: int, *, seed: int) -> tuple[int, ...]:
    """Samples that the training visited, drawn without replacement."""
    drawn = np.random.default_rng(seed).choice(
        run.seen, size=min(count, len(run.seen)), replace=False
    )
    return tuple(sorted(int(sample) for sample in drawn))
