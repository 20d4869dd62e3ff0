"""C3: Diff-In by number of states, by their places, and by the length of a difference.

Digits, 64-64-10 with GELU, SGD; two speeds, so that a step is small (T lr curvature about 0.1) or
is not. Correlation: signed Pearson with leave-one-out of 40 samples. Precision: of self-influence
by size, at the true number of 10 % wrong labels. Cost in trainings.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import backtrail
from backtrail import stats
from bench import data
from bench.papers import classifier
from bench.papers.rows import Figures, Row

SAMPLES, SLOTS, EPOCHS, REMOVALS, WRONG = 500, 50, 10, 40, 0.1
STATES, LENGTHS = (1, 3, 5, 10), (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RATES = {"slow": 1e-3, "fast": 0.1}


def recorded(seed: int, rate: float) -> tuple[backtrail.Run, backtrail.Loss, np.ndarray, float]:
    """The training, the mean test loss, which labels are wrong, and how long the training takes."""
    train, test, _ = data.digits(SAMPLES, 300)
    inputs, labels = train.tensors
    draw = np.random.default_rng(seed)
    wrong = np.zeros(SAMPLES, dtype=bool)
    wrong[draw.choice(SAMPLES, round(WRONG * SAMPLES), replace=False)] = True
    shifted = (labels + torch.from_numpy(draw.integers(1, 10, SAMPLES))) % 10
    rows = TensorDataset(inputs, torch.where(torch.from_numpy(wrong), shifted, labels))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    begun = time.process_time()
    run = classifier.recorded(
        model, optimizer, rows, slots=SLOTS, epochs=EPOCHS, checkpoints=backtrail.Every(10)
    )
    spent = time.process_time() - begun
    return run, backtrail.Loss(test, aggregate="mean"), wrong, spent


def settings(steps: int) -> dict[str, dict[str, object]]:
    """Every kind of Diff-In that is tried."""
    found: dict[str, dict[str, object]] = {f"m = {m}": {"checkpoints": m} for m in STATES}
    found |= {f"ε = {e:.0e}": {"epsilon": e, "sides": "one-sided"} for e in LENGTHS}
    found |= {f"ε = {e:.0e}, central": {"epsilon": e} for e in LENGTHS}
    third = steps // 3
    early, late = (
        range(third // 5, third + 1, third // 5),
        range(steps - third + third // 5, steps + 1, third // 5),
    )
    return found | {
        "early third": {"checkpoints": list(early)[:5]},
        "last third": {"checkpoints": list(late)[:5]},
    }


def measure(seed: int, *, rate: float) -> Figures:
    """Every figure at one speed."""
    run, query, wrong, spent = recorded(seed, rate)
    removed = np.random.default_rng(seed).choice(run.samples, REMOVALS, replace=False).tolist()
    actual = backtrail.leave_one_out(run, query, samples=removed)
    found: Figures = {}
    for name, setting in settings(run.steps).items():
        make: Callable[..., backtrail.DiffIn] = partial(backtrail.DiffIn, **setting)  # type: ignore[arg-type]
        for form in ("corrected", "published"):
            begun = time.process_time()
            influence = make(form=form).attribute(run, query)
            found[f"{name}: cost, {form}"] = (time.process_time() - begun) / spent
            total = influence.total()[:, -1, removed].astype(np.float64)
            found[f"{name}: Pearson, {form}"] = float(stats.pearson(total, actual)[0])
        own = np.abs(make().self_influence(run))
        found[f"{name}: precision"] = stats.precision_at(own, wrong)
    return found


ROWS = tuple(
    Row(
        f"C3-{name}",
        f"Diff-In on digits, SGD lr {rate:g}",
        partial(measure, rate=rate),
        3,
        drawn=True,
    )
    for name, rate in RATES.items()
)
