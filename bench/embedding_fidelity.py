"""How far Data Value Embedding is from the exact sweep, and from leaving visits out.

python -m bench.embedding_fidelity [part of a training's name [seeds [part of a row's name]]]

Digits, 64-32-32-10 with GELU, 10 epochs of 512 samples in batches of 32. Mean over 8 test losses of
the Pearson correlation over visits: with the exact sweep, of all visits and those of the first and
last quarter of the steps; with training again in float64 without one visit, 30 of the first and 30
of the last quarter.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import backtrail
from backtrail.errors import EmbeddingGrew
from backtrail.methods.retrain.retrain import perturb
from backtrail.methods.retrain.weights import Removal
from backtrail.stats import pearson
from bench.data import digits

SAMPLES, SLOTS, EPOCHS, WIDTH, QUERIES, REMOVALS = 512, 32, 10, 32, 8, 30
TRAININGS = {
    "SGD, lr 0.05, momentum 0.9": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "AdamW, lr 1e-3": partial(torch.optim.AdamW, lr=1e-3),
}
COLUMNS = ("whole run", "first quarter", "last quarter", "removals, first", "removals, last")
EMBEDDING = backtrail.DataValueEmbedding
METHODS: dict[str, Any] = {
    "exact sweep": backtrail.DIT(),
    "sweep, Gauss-Newton": backtrail.DIT(curvature=backtrail.GaussNewton()),
    "sweep, empirical Fisher": backtrail.DIT(curvature=backtrail.EmpiricalFisher()),
    "embedding, true": EMBEDDING(fisher="true"),
    "embedding, true, of a quarter": EMBEDDING(fisher="true", drawn=1 / 4),
    "embedding, true, of an eighth": EMBEDDING(fisher="true", drawn=1 / 8),
    "embedding, empirical": EMBEDDING(fisher="empirical"),
    "embedding, true, damping 0.5": EMBEDDING(fisher="true", damping=0.5),
    "embedding, true, damping 0": EMBEDDING(fisher="true", damping=0),
    "embedding, true, rank 64": EMBEDDING(fisher="true", rank=64),
    "embedding, true, mask, every entry": EMBEDDING(
        fisher="true", projection="mask", rank=64 * WIDTH
    ),
    "TracIn": backtrail.TracIn(),
    "gradient-dot": backtrail.GradientDot(),
}


def train(name: str, seed: int) -> tuple[backtrail.Run, Any]:
    """Record one training; the run, and what is asked."""
    data, test, _ = digits(SAMPLES, SAMPLES)
    torch.manual_seed(seed)
    first, second = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(WIDTH, 10))
    task, optimizer = backtrail.classification(model, data), TRAININGS[name](model.parameters())
    loader = DataLoader(data, batch_size=SLOTS, shuffle=True)
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for _ in range(EPOCHS):
            for inputs, labels in recorder.watch(loader):
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder, task), backtrail.Loss(test, samples=range(QUERIES))


def removed(run: backtrail.Run, asked: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Visits `[removal, step and slot]`, and the change of the queries `[query, removal]`.

    The first half of the visits is of the first quarter of the steps, the others of the last.
    """
    draw, quarter = np.random.default_rng(seed), run.steps // 4
    steps = np.concatenate(
        [draw.integers(first, first + quarter, REMOVALS) for first in (0, run.steps - quarter)]
    )
    visits = np.stack([steps, draw.integers(0, SLOTS, 2 * REMOVALS)], 1)
    removals = [Removal(frozenset({run.log[t].samples[b]}), (t, t + 1)) for t, b in visits.tolist()]
    return visits, perturb(run, asked, removals, observed_at=(run.steps,)).change[:, 0]


def influence(method: Any, run: backtrail.Run, asked: Any) -> np.ndarray:
    """Of every visit, `[query, step, slot]`; NaN where the recursion explodes."""
    try:
        return method.attribute(run, asked).values()[:, 0]
    except EmbeddingGrew:
        return np.full((QUERIES, run.steps, SLOTS), np.nan)


def figures(
    found: np.ndarray, exact: np.ndarray, truth: tuple[np.ndarray, np.ndarray]
) -> list[float]:
    """One row of the table."""
    quarter, (visits, change) = found.shape[1] // 4, truth
    stretches = slice(None), slice(quarter), slice(-quarter, None)
    pairs = [[x[:, steps].reshape(len(x), -1) for x in (found, exact)] for steps in stretches]
    predicted = found[:, visits[:, 0], visits[:, 1]]
    pairs += [
        [x[:, part] for x in (predicted, change)]
        for part in (slice(REMOVALS), slice(REMOVALS, None))
    ]
    return [float(pearson(*pair).mean()) for pair in pairs]


def measure(name: str, seeds: int, wanted: str) -> None:
    """Print the table of one training."""
    rows: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        run, asked = train(name, seed)
        truth = removed(run, asked, seed)
        exact = influence(METHODS["exact sweep"], run, asked)
        for label in [label for label in METHODS if wanted in label]:
            rows.setdefault(label, []).append(
                figures(influence(METHODS[label], run, asked), exact, truth)
            )
            print(
                seed,
                label,
                *[f"{number:.2f}" for number in rows[label][-1]],
                file=sys.stderr,
                flush=True,
            )
    print(f"\n| {name} | {' | '.join(COLUMNS)} |\n|---|" + "---|" * len(COLUMNS))
    for label, figured in rows.items():
        print(
            f"| {label} | " + " | ".join(f"{number:.2f}" for number in np.mean(figured, 0)) + " |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, count, row = (*sys.argv[1:], *("", "3", "")[len(sys.argv) - 1 :])
    for training in TRAININGS:
        if chosen in training:
            measure(training, int(count), row)
