"""A2 and A5: a small network on ones and sevens: exactness, removals, windows, and patterns.

The set-up is bench.papers.ones_and_sevens; the query is the mean validation loss, and every sample
is left out. "step by step": every slot of one step is nudged along a random direction, for each
step in turn, in float64. Windows are the 21 epochs: what a sample did to the loss within each,
against leaving it out and reading the loss at both ends.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch

import backtrail
from backtrail import stats
from backtrail.apply.trust import SIZES, steadiest
from backtrail.methods.retrain.retrain import perturb
from backtrail.methods.retrain.weights import Perturbation
from bench.papers.ones_and_sevens import EPOCHS, accuracy, recorded
from bench.papers.rows import Figures, Row

PATTERNS = ("stable", "early", "late", "fluctuating")


def step_by_step(
    run: backtrail.Run, influence: backtrail.Influence, query: backtrail.Loss, *, seed: int
) -> float:
    """Largest error of the derivative by one step's weights, relative to the largest derivative."""
    draw = np.random.default_rng(seed).standard_normal(influence.sample.shape)
    nudges = []
    for step in range(run.steps):
        alone = torch.zeros(draw.shape, dtype=torch.float64)
        alone[step] = torch.from_numpy(draw[step])
        nudges += [
            Perturbation(direction=alone, size=sign * size)
            for size in SIZES
            for sign in (1.0, -1.0)
        ]
    change = (
        perturb(run, query, nudges, observed_at=(run.steps,))
        .change[:, 0]
        .reshape(1, run.steps, -1, 2)
    )
    actual, _ = steadiest((change[..., 0] - change[..., 1]) / (2 * np.array(SIZES)))
    predicted = -(influence.values().astype(np.float64)[:, -1] * draw).sum(-1)
    return float(np.abs(predicted - actual).max() / np.abs(actual).max())


def windows(
    run: backtrail.Run, influence: backtrail.Influence, query: backtrail.Loss
) -> np.ndarray:
    """Pearson of each epoch's window with leaving out."""
    ends = [0, *influence.observed_at]
    change = backtrail.retrain(
        run, query, [[s] for s in range(run.samples)], observed_at=list(influence.observed_at)
    )
    actual = np.diff(change.change[0], axis=0, prepend=0.0)
    predicted = np.stack([influence.window(a, b)[0] for a, b in pairwise(ends)])
    return stats.pearson(predicted.astype(np.float64), actual)


def measure(seed: int, *, trained: bool) -> Figures:
    """All figures of one training."""
    run, validation, _ = recorded(seed, trained=trained)
    query = backtrail.Loss(validation, aggregate="mean")
    influence = backtrail.DIT().attribute(run, query, observed_at="epochs")
    predicted = influence.total()[:, -1].astype(np.float64)
    actual = backtrail.leave_one_out(run, query, samples=range(run.samples))
    ends = [0, *influence.observed_at]
    first, last = (
        influence.window(*ends[place : place + 2])[0].astype(np.float64)
        for place in (0, EPOCHS - 1)
    )
    by_window = windows(run, influence, query)
    return {
        "accuracy": accuracy(run, validation),
        "derivative, step by step": step_by_step(run, influence, query, seed=seed),
        "Pearson with leave-one-out": float(stats.pearson(predicted, actual)[0]),
        "Pearson, first epoch's window": float(by_window[0]),
        "Pearson, last epoch's window": float(by_window[-1]),
        "Pearson, median window": float(np.nanmedian(by_window)),
        "Kendall, first with last epoch": float(stats.kendall(first, last)),
    }


def published(seed: int) -> Figures:
    """At the published rate."""
    return measure(seed, trained=False)


def trained(seed: int) -> Figures:
    """At a rate that trains."""
    return measure(seed, trained=True)


def shares(seed: int, *, trained: bool) -> Figures:
    """How many samples have which pattern over the epochs."""
    run, validation, _ = recorded(seed, trained=trained)
    query = backtrail.Loss(validation, aggregate="mean")
    table = backtrail.patterns(backtrail.DIT().attribute(run, query, observed_at="epochs"))
    return {name: float((table["pattern"] == name).mean() or 0.0) for name in PATTERNS}


def published_shares(seed: int) -> Figures:
    """At the published rate."""
    return shares(seed, trained=False)


def trained_shares(seed: int) -> Figures:
    """At a rate that trains."""
    return shares(seed, trained=True)


_BARS: Mapping[str, str] = {
    "derivative, step by step": "≤ 1e-6",
    "Pearson with leave-one-out": "median ≥ .97",
}
_TAU = {"Kendall, first with last epoch": ".18 to .34"}
_SHARES = {"stable": ".666", "early": ".103", "late": ".206", "fluctuating": ".025"}
ROWS = (
    Row("A2-published", "MNIST 1 and 7, d-8-1, lr 5e-4", published, 16, _TAU, _BARS),
    Row("A2-trained", "the same, lr 0.05", trained, 16, _TAU, _BARS),
    Row("A5-published", "patterns over the epochs, lr 5e-4", published_shares, 16, _SHARES),
    Row("A5-trained", "the same, lr 0.05", trained_shares, 16, _SHARES),
)
