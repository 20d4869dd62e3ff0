"""A6: more of the tracker's paper: halves of training, storage, fluctuating samples, two phases.

"halves": ones and sevens at a rate that trains; each half's window against leave-one-out, and the
whole effect as told by the visits of the last W steps alone. "flips": 10 % wrong labels, looked for
among all samples and among fluctuating ones. "phases": digits 0-4 for the first half of training,
5-9 for the second, so that it is known what mattered when.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import backtrail
from backtrail import stats
from bench import data
from bench.papers.ones_and_sevens import recorded
from bench.papers.rows import Figures, Row

KEPT = (2, 4, 8)  # one half, quarter, eighth of the steps
SAMPLES, SLOTS, EPOCHS, REMOVALS = 600, 32, 8, 60


def halves(seed: int) -> Figures:
    """Pearson of three windows, and of what shorter memories tell of the whole."""
    run, validation, _ = recorded(seed, trained=True)
    query, middle, end = backtrail.Loss(validation, aggregate="mean"), run.steps // 2, run.steps
    influence = backtrail.DIT().attribute(run, query, observed_at=[middle, end])
    everyone = range(run.samples)
    found: Figures = {}
    for name, window in (
        ("[0, T]", (0, end)),
        ("[0, T/2]", (0, middle)),
        ("[T/2, T]", (middle, end)),
    ):
        predicted = influence.window(*window).astype(np.float64)
        actual = backtrail.leave_one_out(run, query, samples=everyone, window=window)
        found[f"Pearson, {name}"] = float(stats.pearson(predicted, actual)[0])
    whole = backtrail.leave_one_out(run, query, samples=everyone)
    for part in KEPT:
        predicted = influence.visits(end - end // part, end).astype(np.float64)
        found[f"Pearson, whole effect by the last 1/{part}"] = float(
            stats.pearson(predicted, whole)[0]
        )
    return found


def flips(seed: int) -> Figures:
    """Precision at the true number of flips, among all samples and among those that fluctuate."""
    run, validation, wrong = recorded(seed, trained=True, flipped=0.1)
    query = backtrail.Loss(validation, aggregate="mean")
    influence = backtrail.DIT().attribute(run, query, observed_at="epochs")
    suspicion = -influence.total()[0, -1].astype(np.float64)
    table = backtrail.patterns(influence)
    some = table["sample"].to_numpy()[(table["pattern"] == "fluctuating").to_numpy()]
    return {
        "precision, all samples": stats.precision_at(suspicion, wrong),
        "fluctuating samples": len(some) / run.samples,
        "precision, fluctuating": stats.precision_at(suspicion[some], wrong[some]),
        "flips that fluctuate": float(wrong[some].sum() / wrong.sum()),
    }


def phases(seed: int) -> Figures:
    """Whether the sweep tells the halves of the training apart, and the second's effect."""
    run, test, first = _two_phases(seed)
    early, late = np.flatnonzero(first), np.flatnonzero(~first)
    old = backtrail.Loss(
        test, samples=torch.nonzero(test.tensors[1] < 5)[:, 0].tolist(), aggregate="mean"
    )
    influence = backtrail.DIT().attribute(run, old, observed_at="epochs")
    middle = run.epochs[EPOCHS - 1]
    table = dict(backtrail.patterns(influence).select("sample", "pattern").rows())
    removed = np.random.default_rng(seed).choice(late, REMOVALS, replace=False).tolist()
    window = influence.window(middle, run.steps)[:, removed].astype(np.float64)
    actual = backtrail.leave_one_out(run, old, samples=removed, window=(middle, run.steps))
    return {
        "first half's samples classified early": float(
            np.mean([table.get(s) == "early" for s in early])
        ),
        "second half's samples classified late": float(
            np.mean([table.get(s) == "late" for s in late])
        ),
        "second half's samples that harm the first task": float(
            (influence.total()[0, -1, late] < 0).mean()
        ),
        "Pearson, second half on the first task's loss": float(stats.pearson(window, actual)[0]),
    }


def _two_phases(seed: int) -> tuple[backtrail.Run, TensorDataset, np.ndarray]:
    """The run, the test rows, and which samples were in the first half."""
    rows, test, _ = data.digits(SAMPLES, 300)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    task = backtrail.classification(model, rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    first = (rows.tensors[1] < 5).numpy()
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for phase in (first, ~first):
            loader = DataLoader(
                rows, SLOTS, sampler=SubsetRandomSampler(np.flatnonzero(phase).tolist())
            )
            for _ in range(EPOCHS):
                for inputs, labels in recorder.watch(loader):
                    cross_entropy(model(inputs), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
    return backtrail.open_run(folder, task), test, first


ROWS = (
    Row("A6-halves", "MNIST 1 and 7, trained: windows and memory", halves, 5),
    Row("A6-flips", "the same, 10 % flipped: fluctuating samples only", flips, 5),
    Row("A6-phases", "digits 0-4, then 5-9", phases, 5),
)
