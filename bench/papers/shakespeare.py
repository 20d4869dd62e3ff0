"""The small language model of B2 and B3: 34 k parameters, three passes over 4,096 rows.

AdamW (0.9, 0.95) with weight decay 0.1, batches of 32 rows of 32 letters; the rate rises over the
first 5 % of steps, and falls as a cosine to a tenth. Shakespeare from the folder BACKTRAIL_DATA,
else the source code of torch's functions. What was recorded and found is kept in
runs/papers/shakespeare.
"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.influence.writer import from_arrays
from backtrail.queries import Query
from bench import data
from bench.models import GPT

FOLDER = Path("runs/papers/shakespeare")
ROWS, EPOCHS, SLOTS, CONTEXT, WIDTH = 4096, 3, 32, 32, 32
RATE, WARM, FLOOR = 3e-3, 0.05, 0.1
VALIDATION, TEST = 64, 256  # rows to select by, and rows to judge by


@cache
def rows() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """What is trained on, what is selected by, and what is judged by."""
    train, rest, _ = data.letters(ROWS, VALIDATION + TEST, context=CONTEXT)
    parts = [
        TensorDataset(*(t[part] for t in rest.tensors))
        for part in (slice(VALIDATION), slice(VALIDATION, None))
    ]
    return train, parts[0], parts[1]


def schedule(step: int) -> float:
    """The learning rate of a step as a share of the highest."""
    steps = EPOCHS * math.ceil(ROWS / SLOTS)
    warm = WARM * steps
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def run(seed: int = 0) -> backtrail.Run:
    """The recorded training; recorded first where it is not there yet."""
    torch.manual_seed(seed)
    model, train, folder = (
        GPT(128, WIDTH, layers=2, context=CONTEXT),
        rows()[0],
        FOLDER / f"seed-{seed}",
    )
    task = backtrail.language_model(model, train)
    if not folder.exists():
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1
        )
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        with backtrail.Recorder(folder, task, optimizer) as recorder:
            for _ in range(EPOCHS):
                for inputs, targets in recorder.watch(DataLoader(train, SLOTS, shuffle=True)):
                    cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    rates.step()
    return backtrail.open_run(folder, task)


# As published, which knows nothing of Adam; and following Adam.
EMBEDDINGS = {
    "dve-rate": backtrail.DataValueEmbedding(follow="rate"),
    "dve-adam": backtrail.DataValueEmbedding(),
}


def influence(
    run: backtrail.Run, name: str, queries: Query, *, method: str = "dit"
) -> backtrail.Influence:
    """The influence on some queries, stored under a name; computed where it is not there yet."""
    out = run.path / f"{method}-{name}"
    if method == "dve-adam-body":
        return without(run, queries, "head")
    if method in EMBEDDINGS:
        vectors = EMBEDDINGS[method].embed(run, out=run.path / method)
        return vectors.attribute(queries, out=out)
    if method == "dit":
        return backtrail.DIT().attribute(run, queries, out=out)
    return (backtrail.TracIn() if method == "tracin" else backtrail.GradientDot()).attribute(
        run, queries, out=out
    )


def without(run: backtrail.Run, queries: Query, layer: str) -> backtrail.Influence:
    """The influence by embeddings that follow Adam, without the part through one layer."""
    vectors = EMBEDDINGS["dve-adam"].embed(run, out=run.path / "dve-adam")
    found, part = vectors.attribute(queries), slice(*vectors.about.blocks[layer])
    asked = vectors._slopes(queries, run.steps)[:, part].double().numpy()
    blocks = [vectors.values(step, step + 1)[0, :, part] @ asked.T for step in range(run.steps)]
    values = found.values() - np.stack(blocks).transpose(2, 0, 1)[:, None]
    return from_arrays(found.description, values, sample=found.sample)
