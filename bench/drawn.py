"""The fidelity that an embedding loses with labels drawn for some samples.

python -m bench.drawn [seeds]

A GPT of 31 k parameters, 3 epochs of 768 sequences of 32 in batches of 32. Mean over 8 test losses
of the Pearson correlation over visits with the exact sweep: of all visits, and of the last quarter
of the steps.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import backtrail
from backtrail.stats import pearson
from bench import sweep
from bench.models import GPT, sentences

SLOTS, STEPS, EPOCHS, CONTEXT, QUERIES = 32, 24, 3, 32, 8
RULES: dict[str, Any] = {
    "AdamW, lr 2e-3": partial(torch.optim.AdamW, lr=2e-3),
    "SGD, lr 0.1, momentum 0.9": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
EMBEDDINGS = {"empirical Fisher": backtrail.DataValueEmbedding(fisher="empirical")} | {
    f"true Fisher, drawn={share:g}": backtrail.DataValueEmbedding(drawn=share)
    for share in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
}


def train(rule: Any, seed: int) -> tuple[backtrail.Run, backtrail.Loss]:
    """Record one training; the run, and what is asked."""
    torch.manual_seed(seed)
    data, held_out = (
        sentences(SLOTS * STEPS, context=CONTEXT),
        sentences(SLOTS * STEPS + QUERIES, context=CONTEXT),
    )
    model = GPT(width=32, layers=2, context=CONTEXT)
    task, optimizer = backtrail.language_model(model, data), rule(model.parameters())
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        loader = DataLoader(data, batch_size=SLOTS, shuffle=True)
        for _ in range(EPOCHS):
            sweep.train(task, optimizer, recorder.watch(loader))
    return backtrail.open_run(folder, task), backtrail.Loss(
        held_out, samples=range(SLOTS * STEPS, len(held_out))
    )


def figures(found: np.ndarray, exact: np.ndarray) -> list[float]:
    """Of influences `[query, step, slot]`."""
    parts = slice(None), slice(-(found.shape[1] // 4), None)
    pairs = ([x[:, part].reshape(len(x), -1) for x in (found, exact)] for part in parts)
    return [float(pearson(*pair).mean()) for pair in pairs]


def main() -> None:
    """Print a table for each optimizer."""
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    for name, rule in RULES.items():
        rows: dict[str, list[list[float]]] = {label: [] for label in EMBEDDINGS}
        for seed in range(seeds):
            run, asked = train(rule, seed)
            exact = backtrail.DIT().attribute(run, asked).values()[:, 0]
            for label, made in EMBEDDINGS.items():
                rows[label].append(figures(made.attribute(run, asked).values()[:, 0], exact))
        print(f"\n| {name}, {seeds} seeds | whole run | last quarter |\n|---|---|---|")
        for label, figured in rows.items():
            print(
                f"| {label} | "
                + " | ".join(f"{number:.2f}" for number in np.mean(figured, 0))
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
