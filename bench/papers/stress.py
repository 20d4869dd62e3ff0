"""Stress: every method at large learning rates, and how many states some of them need.

Digits, 64-64-10 with GELU, 500 samples, SGD in batches of 50 for 10 epochs, and ones and sevens at
a rate that trains (bench.papers.ones_and_sevens). Pearson with leave-one-out of 40 samples, mean
validation loss; the spread over seeds is in the interval.
"""

from functools import partial

import numpy as np

import backtrail
from backtrail import stats
from bench.papers import c3
from bench.papers.ones_and_sevens import recorded
from bench.papers.rows import Figures, Row

RATES, STATES, REMOVALS = (0.01, 0.1, 0.5, 1.0), (1, 2, 5, 10, 20), 40
METHODS = {
    "DIT": backtrail.DIT(),
    "DIT, Gauss-Newton": backtrail.DIT(curvature=backtrail.GaussNewton()),
    "embedding": backtrail.DataValueEmbedding(rank=64),
    "Diff-In, corrected": backtrail.DiffIn(form="corrected"),
    "TracIn": backtrail.TracIn(),
}


def agreeing(
    run: backtrail.Run, query: backtrail.Loss, methods: dict[str, object], *, seed: int
) -> Figures:
    """Signed Pearson of each method with leave-one-out."""
    removed = np.random.default_rng(seed).choice(run.samples, REMOVALS, replace=False).tolist()
    actual = backtrail.leave_one_out(run, query, samples=removed)
    found: Figures = {}
    for name, method in methods.items():
        total = method.attribute(run, query).total()[:, -1, removed]  # type: ignore[attr-defined]
        found[name] = float(stats.pearson(total.astype(np.float64), actual)[0])
    return found


def rates(seed: int) -> Figures:
    """By learning rate."""
    found: Figures = {}
    for rate in RATES:
        run, query, _, _ = c3.recorded(seed, rate)
        found |= {
            f"lr {rate:g}: {name}": value
            for name, value in agreeing(run, query, METHODS, seed=seed).items()
        }
    return found


def states(seed: int, *, task: str) -> Figures:
    """By the number of states that are looked at."""
    if task == "digits":
        run, query, _, _ = c3.recorded(seed, 0.1)
    else:
        run, validation, _ = recorded(seed, trained=True)
        query = backtrail.Loss(validation, aggregate="mean")
    tried = {f"Diff-In, corrected, m = {m}": backtrail.DiffIn(m, form="corrected") for m in STATES}
    return agreeing(
        run, query, {**tried, "TracIn, kept states": backtrail.TracIn(states="kept")}, seed=seed
    )


ROWS = (
    Row("Stress-rates", "digits, SGD, from a small rate to a large one", rates, 5),
    Row(
        "Stress-states-digits", "digits, lr 0.1: how many states", partial(states, task="digits"), 5
    ),
    Row("Stress-states-sevens", "ones and sevens, lr 0.05", partial(states, task="sevens"), 5),
)
