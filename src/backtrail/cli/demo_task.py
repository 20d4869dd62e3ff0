"""The training of `backtrail demo`: handwritten digits, a tenth of the labels wrong on purpose.

`backtrail demo` runs this file and leaves a copy of it beside what it writes, as task.py, so that
other commands find the `task` and the `queries` there. Change the copy, and it is a first
experiment of your own.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.extras import need
from backtrail.queries import Query
from backtrail.record.recorder import Watched

TRAINING, VALIDATION, WRONG = (
    1000,
    400,
    100,
)  # digits to learn, to ask about, and learned with a wrong label
EPOCHS, BATCH, RATE = 10, 50, 2e-3
SEED = 1

Batches = Watched | DataLoader[tuple[Tensor, ...]]


@final
@dataclass(frozen=True, slots=True)
class Digits:
    """Real handwriting, 8 x 8 grey pixels, cut in three.

    Attributes:
        training: what the model learns, wrong labels among it.
        validation: what the query asks about; no wrong labels.
        test: what neither training nor query has seen.
        truth: the right labels of the training digits, `[sample]`.
        wrong: whether a training digit got a wrong label, `[sample]`.
    """

    training: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    truth: Tensor
    wrong: Tensor


@cache
def digits() -> Digits:
    """Shuffle the digits, cut them, and make some labels wrong; the same ones every time."""
    pixels, labels = need("sklearn.datasets", "demo").load_digits(return_X_y=True)
    draw = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(labels), generator=draw)
    inputs, truth = (
        torch.tensor(pixels, dtype=torch.float32)[order] / 16,
        torch.tensor(labels)[order],
    )
    wrong = torch.zeros(TRAINING, dtype=torch.bool)
    wrong[torch.randperm(TRAINING, generator=draw)[:WRONG]] = True
    given = truth.clone()
    given[:TRAINING] += wrong * torch.randint(1, 10, (TRAINING,), generator=draw)
    given %= 10
    learned, asked, kept = (
        slice(TRAINING),
        slice(TRAINING, TRAINING + VALIDATION),
        slice(TRAINING + VALIDATION, None),
    )
    training, validation, test = (
        TensorDataset(inputs[cut], given[cut]) for cut in (learned, asked, kept)
    )
    return Digits(training, validation, test, truth[learned], wrong)


def task() -> backtrail.Task:
    """A small network with fresh weights, the same ones every time, on the training digits."""
    torch.manual_seed(SEED)
    layers = (nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    return backtrail.classification(nn.Sequential(*layers), digits().training)


def queries() -> Query:
    """One query: the mean loss on the validation digits."""
    return backtrail.Loss(digits().validation, aggregate="mean")


def fit(learner: backtrail.Task, folder: Path | None = None) -> float:
    """Train the model of a task, recording it where a folder is given; the seconds that it took."""
    # Adam's first update is g / (|g| + eps): below about 1e-6 a float32 gradient's size and sign
    # are mostly rounding.
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=RATE, eps=1e-6)
    loader = DataLoader(
        learner.data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(SEED)
    )
    start = perf_counter()
    if folder is None:
        _learn(learner.model, loader, optimizer)
    else:
        # The loop is the same with and without a recorder, but for what it loops over.
        with backtrail.Recorder(
            folder, learner, optimizer, checkpoints=backtrail.Epochs()
        ) as recorder:
            _learn(learner.model, recorder.watch(loader), optimizer)
    return perf_counter() - start


def _learn(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    """An ordinary training loop; the learning rate falls to a tenth."""
    steps = EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.1, total_iters=steps
    )
    for _ in range(EPOCHS):
        for inputs, labels in batches:
            loss: Tensor = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
