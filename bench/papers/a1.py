"""A1: how well the exact influence predicts leave-one-out where training is convex.

Adult, logistic regression on 256 rows, 256 others to ask about; SGD in batches of 64, rate 0.1 /
sqrt(t + 1), 21 epochs, L2 as strong as cross-validation picks it (arXiv 2502.10793). All 256
samples are left out, one at a time.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail import stats
from bench import data
from bench.papers.rows import Figures, Row

SAMPLES, SLOTS, EPOCHS, COMMON = 256, 64, 21, 0.05


def people(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Two parts of Adult, drawn by the seed and standardised; without it, of breast cancer."""
    x, y = _adult() if data.folder("adult") else _breast_cancer()
    order = np.random.default_rng(seed).permutation(len(x))[: 2 * SAMPLES]
    first, second = np.array_split(order, 2)
    scale = x[first].std(0)
    x = (x[order] - x[first].mean(0)) / np.where(scale > 0, scale, 1.0)
    one, two = (
        TensorDataset(torch.tensor(r), torch.tensor(y[p]))
        for r, p in zip(np.array_split(x, 2), (first, second), strict=True)
    )
    return one, two


def _adult() -> tuple[np.ndarray, np.ndarray]:
    """Numbers as they are; for every question, a column per answer that one in twenty gives."""
    place = data.folder("adult")
    assert place is not None
    lines = (place / "adult-train.csv").read_text().split("\n")
    table = np.array([[cell.strip() for cell in line.split(",")] for line in lines if line])
    columns = []
    for answers in table.T[:-1]:
        if answers[0].isdigit():
            columns.append(answers.astype(np.float64))
        else:
            kinds, counts = np.unique(answers, return_counts=True)
            columns += [
                (answers == kind).astype(np.float64)
                for kind in kinds[counts >= COMMON * len(table)]
            ]
    return np.stack(columns, 1), (table[:, -1] == ">50K").astype(np.float64)


def _breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415

    x, y = load_breast_cancer(return_X_y=True)
    return x, y.astype(np.float64)


def strength(rows: TensorDataset) -> float:
    """The L2 penalty of a mean loss that cross-validation picks."""
    from sklearn.linear_model import LogisticRegressionCV  # noqa: PLC0415

    x, y = (tensor.numpy() for tensor in rows.tensors)
    picked = LogisticRegressionCV(
        max_iter=2000, l1_ratios=(0.0,), use_legacy_attributes=False, scoring="accuracy"
    )
    return 1.0 / (float(np.ravel(picked.fit(x, y).C_)[0]) * len(x))


def loss(outputs: Tensor, batch: Any) -> Tensor:
    """Binary cross-entropy of every row."""
    return binary_cross_entropy_with_logits(outputs[:, 0], batch[1], reduction="none")


def recorded(rows: TensorDataset, seed: int) -> backtrail.Run:
    """The training."""
    torch.manual_seed(seed)
    model, alpha = nn.Linear(rows.tensors[0].shape[1], 1).double(), strength(rows)

    def penalty(params: dict[str, Tensor]) -> Tensor:
        return alpha / 2 * params["weight"].square().sum()

    task = backtrail.Task(model, rows, loss, penalty=penalty)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1) ** 0.5)
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for _ in range(EPOCHS):
            for batch in recorder.watch(DataLoader(rows, SLOTS, shuffle=True)):
                (
                    loss(model(batch[0]), batch).mean() + penalty(dict(model.named_parameters()))
                ).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return backtrail.open_run(folder, task)


def measure(seed: int) -> Figures:
    """Pearson and slope over all samples."""
    rows, others = people(seed)
    run, query = recorded(rows, seed), backtrail.Loss(others, aggregate="mean")
    predicted = backtrail.DIT().attribute(run, query).total()[:, -1]
    actual = backtrail.leave_one_out(run, query, samples=range(len(rows)))
    return {
        "Pearson with leave-one-out": float(stats.pearson(predicted, actual)[0]),
        "slope": float(stats.slope(predicted, actual)[0]),
    }


ROWS = (
    Row(
        "A1",
        "Adult, logistic regression",
        measure,
        published={"Pearson with leave-one-out": "up to .99"},
        bars={"Pearson with leave-one-out": "≥ .99"},
    ),
)
