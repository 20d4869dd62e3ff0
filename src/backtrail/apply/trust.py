"""Whether to believe an influence: three checks, each measured on the user's own run.

Replay: the recording reproduces the training. Derivative: the influence is the derivative of the
retrained query. Removal: the influence predicts what happens when samples are really left out. The
second check tests the arithmetic. The third also tests whether leaving out one sample is a change
small enough for a derivative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float

from backtrail import arguments, stats
from backtrail.errors import ReplayMismatch, WithoutQueries, WrongData, join_items
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.tables import places
from backtrail.methods.observe import check_queries, check_run
from backtrail.methods.result import precision
from backtrail.methods.retrain.retrain import Denominator, Retrained, perturb, retrain
from backtrail.methods.retrain.weights import Perturbation
from backtrail.queries import Query
from backtrail.run.run import AUTOCAST, Run, Verification
from backtrail.stats import Interval
from backtrail.step.optimizers import rule_named

# Sizes h of the change of the sample weights. A large h is not yet in the linear range, and a small
# one is lost in rounding; which are in between depends on the training.
SIZES = (1e-3, 1e-4, 1e-5, 1e-6)
COARSE_SIZES = (1e-1, 1e-2, 1e-3, 1e-4)  # where retraining is not in float64
# Largest relative error of a passed derivative check, by precision of the sweep. Retraining is in
# float64, so a float32 run is retrained along slightly different states.
EXACT = {"float32": 5e-3, "float64": 1e-5}
# An error may exceed this where retraining is uncertain too, but no uncertainty above KNOWN counts:
# otherwise a check that measures nothing would pass.
KNOWN = 1e-2
GOOD = 0.9  # lowest Pearson correlation of a passed removal check
ENOUGH = 10  # removals; a correlation over fewer is mostly chance
CLOSE = 0.05  # a Pearson correlation less than this below the best one to expect is as good as it
RIGHT_SIZE = 1.5  # the advice mentions the slope of an approximation beyond this factor from 1
# Names of torch's layers whose derivative jumps.
KINKED = frozenset(
    {
        "AdaptiveMaxPool1d",
        "AdaptiveMaxPool2d",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "LeakyReLU",
        "MaxPool1d",
        "MaxPool2d",
        "MaxPool3d",
        "PReLU",
        "RReLU",
        "ReLU",
        "ReLU6",
        "Softshrink",
        "Threshold",
    }
)
EARLY = 0.5  # share of the influence above which the advice names step 0 as the cause


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
        """Whether the error is within rounding, or within the uncertainty of retraining."""
        uncertainty = min(self.uncertainty, KNOWN)
        return self.error <= max(self.allowed, 3 * uncertainty)

    def __str__(self) -> str:
        """One sentence."""
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"derivative  {verdict}: influence and retraining with slightly changed sample weights "
            f"differ by {self.error:.1e} (relative; uncertainty {self.uncertainty:.0e}); "
            f"the query's derivative grew {self.growth:.3g}-fold in the sweep"
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
        actual: Change by retraining, `[query, sample]`; NaN where the training diverged.
        pearson: Pearson correlation, mean over queries, with its bootstrap interval over samples.
        spearman: Spearman rank correlation, likewise.
        slope: Slope of actual over predicted, mean over queries; 1 means the right size.
        noise: Largest difference of two unperturbed re-runs; smaller changes mean nothing.
        reachable: Pearson correlation of the actual changes with their own linear part, mean over
            queries: the best that any score additive over samples can be expected to reach. It is
            an estimate like `pearson`, so it can be the lower of the two by chance. None where the
            batch's denominator is renormalised.
    """

    samples: tuple[int, ...]
    predicted: Float[np.ndarray, "query sample"]
    actual: Float[np.ndarray, "query sample"]
    pearson: Interval
    spearman: Interval
    slope: float
    noise: float
    reachable: float | None = None

    @staticmethod
    def not_made(queries: int) -> "RemovalCheck":
        """The check of a run that does not replay: re-runs would be of another training."""
        nothing = np.zeros((queries, 0))
        unknown = Interval(np.nan, np.nan, np.nan)
        return RemovalCheck((), nothing, nothing, unknown, unknown, slope=np.nan, noise=np.nan)

    @property
    def passed(self) -> bool:
        """Whether the Pearson correlation is at least 0.9."""
        return self.pearson.estimate >= GOOD

    @property
    def diverged(self) -> tuple[int, ...]:
        """Samples without which the training ends with a query that is NaN or infinite."""
        is_nan = ~np.isfinite(self.actual).all(axis=0)
        return tuple(np.array(self.samples, dtype=np.int64)[is_nan].tolist())

    @property
    def undecided(self) -> bool:
        """Whether the interval of the Pearson correlation has 0.9 inside."""
        return self.pearson.low < GOOD <= self.pearson.high

    @property
    def too_few(self) -> bool:
        """Whether fewer than 10 samples were left out, so that the correlations say little."""
        return len(self.samples) < ENOUGH

    @property
    def exhausted(self) -> bool:
        """Whether the correlation is about as good as that of any additive score can be."""
        if self.reachable is None or self.too_few:
            return False
        return self.pearson.estimate >= self.reachable - CLOSE

    def __str__(self) -> str:
        """One sentence."""
        if not self.samples:
            return "removal     not made: re-runs would be of another training"
        verdict = "passed" if self.passed else "FAILED"
        if self.undecided:
            verdict = "undecided"
        figures = (
            f"removal     {verdict}: {len(self.samples)} samples left out one at a time: "
            f"Pearson {self.pearson}, Spearman {self.spearman}, slope {self.slope:.2f}, "
            f"noise floor {self.noise:.1e}"
        )
        if self.diverged:
            figures += (
                f"; without sample {join_items(self.diverged, most=6)} the training diverged (a "
                "query is NaN or infinite)"
            )
        if self.too_few:
            return f"{figures}; fewer than {ENOUGH} removals are too few for a reliable correlation"
        if self.reachable is None or not np.isfinite(self.reachable):
            return figures
        reach = f"best Pearson any additive score can reach: {self.reachable:.2f}"
        # Compared as printed: two equal figures need no explanation.
        if round(self.reachable, 2) < round(self.pearson.estimate, 2):
            reach += " (lower than the measured one: both are noisy estimates)"
        return f"{figures}; {reach}"

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

    `print(result)` shows a line per check, and what they mean together; `result.advice` is that
    last part alone.

    >>> import numpy as np
    >>> from backtrail.run.run import Verification
    >>> from backtrail.stats import Interval
    >>> one = Interval(1.0, 1.0, 1.0)
    >>> samples = tuple(range(12))
    >>> effects = np.array([samples]) / 100
    >>> removal = RemovalCheck(samples, effects, effects, one, one, slope=1.0, noise=0.0)
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
        fed_may_depend_on_model: Whether batches were given by `recorder.fed` that may depend on the
            model. The checks hold them constant, as the influence does, and so say nothing of that.
        remarks: What has to be said about the re-runs, if anything, like another precision.
        causes: What may make removals differ from a derivative in this training: layers with kinks,
            a nonlinear optimizer.
    """

    replay: Verification | str
    derivative: DerivativeCheck | None
    removal: RemovalCheck
    early: float
    method: str = "DIT"
    fed_may_depend_on_model: bool = False
    remarks: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The checks, a line each, and what they mean together."""
        verdict = "passed" if isinstance(self.replay, Verification) else "FAILED"
        lines = [f"replay      {verdict}: {self.replay}"]
        if self.derivative is not None:
            lines.append(str(self.derivative))
        lines.append(str(self.removal))
        for remark in self.remarks:
            lines.append(f"note        {remark}")
        lines.append(self.advice)
        return "\n".join(lines)

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
        if not self.fed_may_depend_on_model:
            return self._advice_on_checks()
        return (
            f"{self._advice_on_checks()} All this holds only if what was fed does not depend on "
            "the model: batches were given by recorder.fed, and influence, retraining and these "
            "checks hold them constant. If they contain a teacher's outputs, a carried state, or "
            "anything else computed from the model, influence through them is missing. If "
            "not, say so while "
            "recording: recorder.fed(batch, depends_on_model=False)."
        )

    def _advice_on_checks(self) -> str:
        if not isinstance(self.replay, Verification):
            return "Do not use these scores: the recording does not reproduce the training."
        if self.derivative is not None and not self.derivative.passed:
            return "Do not use these scores: they are not the derivative of this training."
        if self.removal.too_few:
            return (
                f"Too few samples were left out ({len(self.removal.samples)}) to tell whether "
                f"influence predicts removals on this run. Leave out at least {ENOUGH}, for "
                "example with removals=32."
            )
        if self.removal.undecided:
            return (
                f"Undecided: with {len(self.removal.samples)} removals the interval of the Pearson "
                f"correlation has {GOOD} inside. Leave out more, for example with "
                f"removals={4 * len(self.removal.samples)}."
            )
        if self.method != "DIT":
            return self._advice_on_an_approximation()
        if self.removal.passed:
            return "Influence predicts removals on this run."
        if self.early > EARLY:
            return (
                f"{self.early:.0%} of the influence comes from step 0. Adam's first update is "
                "g / (|g| + eps): where a gradient g is near zero, the derivative of the update is "
                "very large and does not predict removals. Attribute again with "
                "DIT(slope=backtrail.Secant()); in the next training, use a warm-up or eps=1e-6."
            )
        return self._advice_on_rough_training()

    def _advice_on_rough_training(self) -> str:
        if self.derivative is None:
            what = "The influence is a poor predictor of removals"
        else:
            what = "The derivative is correct, but a poor predictor of removals"
        causes = join_items([*self.causes, "a large learning rate"])
        why = f"at the scale of one sample this training is not smooth (possible causes: {causes})"
        if self.removal.exhausted:
            return (
                f"{what}: {why}. No additive score does much better: counting a sample twice does "
                "not have the opposite effect of leaving it out. Scores of groups are more "
                "reliable than scores of single samples."
            )
        return (
            f'{what}: {why}. DIT(curvature="auto") measures whether another curvature or slope '
            "does better. Ranks are more reliable than sizes, and scores of groups more than "
            "scores of single samples."
        )

    def _advice_on_an_approximation(self) -> str:
        if not self.removal.passed and self.method == "PathIntegrated":
            return (
                "PathIntegrated is a poor predictor of single removals on this run. Compare its "
                "influence.standard_error() with the scores: where it is as large, more re-runs "
                "help (runs=). Otherwise the difference is that the other samples have random "
                "weights as well: a smaller share= leaves more of them as they were. Single "
                "visits are shares of a removal, and are not checked here."
            )
        if not self.removal.passed:
            return (
                f"{self.method} is a poor predictor of removals on this run. It neglects a part of "
                "the training that matters here (see its documentation). Attribute again with "
                "backtrail.DIT(), which neglects nothing, and check that result too."
            )
        slope = self.removal.slope
        if not 1 / RIGHT_SIZE <= slope <= RIGHT_SIZE:
            return (
                f"{self.method} ranks removals well on this run, but the actual changes are about "
                f"{slope:.3g} times the predicted ones."
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
    dtype: torch.dtype | None = torch.float64,
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
        dtype: Precision of the re-runs; None for the recorded one, which is also taken where the
            model or a query cannot be computed in this one. The result says so.

    Returns:
        The three checks; `print` shows them, and what they mean together.

    Raises:
        BadSetting: An argument has an invalid value.
        OtherRun: The influence belongs to another run.
        WithoutQueries: The influence was opened from disk and no queries were given, or other ones
            than it was computed for.
    """
    check_run(run)
    arguments.instance("influence", influence, Influence, "an influence of the run")
    influence.check_run(run)
    if queries is not None:
        check_queries(queries)
    removals = arguments.whole("removals", removals, least=1)
    seed = arguments.seed("seed", seed)
    asked = influence.query_object if queries is None else queries
    if not isinstance(asked, Query) or asked.names != influence.queries:
        raise WithoutQueries(influence.queries)
    try:
        replay: Verification | str = run.verify()
    except (ReplayMismatch, WrongData) as mismatch:
        not_made = RemovalCheck.not_made(len(influence.queries))
        early = early_share(influence)
        return Trust(str(mismatch), None, not_made, early=early, method=influence.method)
    samples = draw_visited(run, removals, seed=seed)
    removal, reruns = removal_check(run, influence, asked, samples=samples, dtype=dtype)
    if reruns.precision != str(dtype).removeprefix("torch."):
        dtype = None  # the other precision failed, and would again
    derivative = None
    # An influence that is not meant to be the derivative would fail this check, however good it is.
    is_exact = influence.description.settings.get("exact", True)
    if influence.denominator == "keep" and is_exact:
        derivative = derivative_check(run, influence, asked, seed=seed, dtype=dtype)
    return Trust(
        replay,
        derivative,
        removal,
        early=early_share(influence),
        method=influence.method,
        fed_may_depend_on_model=run.fed_may_depend_on_model,
        remarks=reruns.remarks,
        causes=_causes(run),
    )


def _causes(run: Run) -> tuple[str, ...]:
    """What may make removals in this training differ from a derivative."""
    causes: list[str] = []
    kinds = {type(module).__name__ for module in run.task.model.modules()}
    kinked = sorted(kinds & KINKED)
    if kinked:
        causes.append(f"the kinks of {join_items(kinked)}")
    if not rule_named(run.manifest.optimizer).linear:
        causes.append(f"the nonlinear update of {run.manifest.optimizer}")
    return tuple(causes)


@exclusive
def derivative_check(
    run: Run,
    influence: Influence,
    queries: Query,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float64,
) -> DerivativeCheck:
    """Change all sample weights along one random direction, both ways, and compare."""
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(influence.sample.shape)  # d, [step, slot]
    weights = torch.from_numpy(direction)
    perturbations = []
    # In a coarser precision the effect of a tiny change would be rounding.
    sizes = SIZES if (dtype or run.task.dtype) == torch.float64 else COARSE_SIZES
    for size in sizes:
        perturbations.append(Perturbation(direction=weights, size=size))
        perturbations.append(Perturbation(direction=weights, size=-size))
    found = perturb(run, queries, perturbations, observed_at=influence.observed_at, dtype=dtype)
    plus = found.change[:, :, 0::2]
    minus = found.change[:, :, 1::2]
    slopes = (plus - minus) / (2 * np.array(sizes))  # [query, observed_at, size]
    actual, uncertainty = steadiest(slopes)

    # Influence is the effect of a removal, which lowers a weight: hence the sign.
    values = influence.values().astype(np.float64)
    predicted = -np.einsum("qotb,tb->qo", values, direction)

    # Relative to the query's largest derivative: at some states it may be zero.
    scale = np.abs(actual).max(axis=1, keepdims=True) + 1e-300
    errors = np.abs(predicted - actual) / scale
    uncertainties = uncertainty / scale
    # A training under float16 is replayed without it, so sweep and re-run go along slightly
    # different states.
    if any(step.autocast == "float16" for step in run.log):
        allowed = AUTOCAST
    else:
        allowed = EXACT[precision(run)]
    return DerivativeCheck(
        error=float(errors.max()),
        uncertainty=float(uncertainties.max()),
        growth=float(influence.growth.max()),
        allowed=allowed,
    )


def early_share(influence: Influence) -> float:
    """Share of the absolute influence on the last observed state that stems from step 0."""
    whole = np.abs(influence.values()[:, -1]).sum()
    first = np.abs(influence.values(0, 1)[:, -1]).sum()
    return float(first / whole) if whole > 0 else 0.0


def steadiest(slopes: Float[np.ndarray, "query observed_at size"]) -> tuple[np.ndarray, np.ndarray]:
    """Extrapolate the two neighbouring sizes h that agree best; also return their difference."""
    gaps = np.abs(np.diff(slopes, axis=2))
    best = gaps.argmin(axis=2)[..., None]
    large = np.take_along_axis(slopes, best, 2)[..., 0]
    small = np.take_along_axis(slopes, best + 1, 2)[..., 0]
    gap = np.take_along_axis(gaps, best, 2)[..., 0]
    # Richardson: the error of a central difference goes with h squared.
    ratio = (SIZES[0] / SIZES[1]) ** 2
    return (ratio * small - large) / (ratio - 1), gap


@exclusive
def removal_check(
    run: Run,
    influence: Influence,
    queries: Query,
    *,
    samples: Sequence[int],
    dtype: torch.dtype | None = torch.float64,
) -> tuple[RemovalCheck, Retrained]:
    """Retrain without each of the samples; compare with the total at the last observed state.

    Returns:
        The check, and the re-runs that it is made of.
    """
    denominator: Denominator = "keep" if influence.denominator == "keep" else "renormalize"
    last = influence.observed_at[-1]
    groups = [[sample] for sample in samples]
    removed = retrain(run, queries, groups, observed_at=last, denominator=denominator, dtype=dtype)
    actual = removed.change[:, 0]
    reachable = None
    if removed.precision != str(dtype).removeprefix("torch."):
        dtype = None  # the other precision failed, and would again
    if denominator == "keep":
        doubled = retrain(run, queries, groups, observed_at=last, weight=2.0, dtype=dtype)
        # What is linear in a sample's weight changes its sign where the sample is counted twice.
        linear = (actual - doubled.change[:, 0]) / 2
        reachable = stats.mean_over_queries(stats.pearson(linear, actual))
    columns = places(influence.ids, samples)
    predicted = influence.total()[:, -1][:, columns]
    check = RemovalCheck(
        samples=tuple(samples),
        predicted=predicted,
        actual=actual,
        pearson=stats.bootstrap(stats.pearson, predicted, actual),
        spearman=stats.bootstrap(stats.spearman, predicted, actual),
        slope=stats.mean_over_queries(stats.slope(predicted, actual)),
        noise=float(removed.noise.max()),
        reachable=reachable,
    )
    return check, removed


def draw_visited(run: Run, count: int, *, seed: int) -> tuple[int, ...]:
    """Samples that the training visited, drawn without replacement."""
    generator = np.random.default_rng(seed)
    size = min(count, len(run.seen))
    drawn = generator.choice(run.seen, size=size, replace=False)
    return tuple(sorted(drawn.tolist()))
