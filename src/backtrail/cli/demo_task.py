"""The training of `backtrail demo`: handwritten digits, a tenth of them mislabelled on purpose.

`backtrail demo` runs this file and copies it next to its results as task.py, where other commands
find the `task` and the `queries`. Edit the copy for experiments of your own.
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
from backtrail.record.recorder import WatchedLoader

TRAINING = 1000  # digits to train on
VALIDATION = 400  # digits whose mean loss is the query
WRONG = 100  # training digits that get a wrong label
EPOCHS = 10
BATCH = 50
RATE = 2e-3
SEED = 1

Batches = WatchedLoader | DataLoader[tuple[Tensor, ...]]


@final
@dataclass(frozen=True, slots=True)
class Digits:
    """Real handwritten digits, 8 x 8 grey pixels, in three parts.

    Attributes:
        training: What the model is trained on; some labels are wrong.
        validation: What the query is about; no wrong labels.
        test: What neither the training nor the query has seen.
        truth: The right labels of the training digits, `[sample]`.
        wrong: Whether a training digit has a wrong label, `[sample]`.
    """

    training: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    truth: Tensor
    wrong: Tensor


@cache
def digits() -> Digits:
    """Shuffle the digits, split them, and make some labels wrong; the same ones every time."""
    pixels, classes = need("sklearn.datasets", "demo").load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(classes), generator=generator)
    inputs = torch.tensor(pixels, dtype=torch.float32)[order] / 16
    truth = torch.tensor(classes)[order]

    wrong = torch.zeros(TRAINING, dtype=torch.bool)
    wrong[torch.randperm(TRAINING, generator=generator)[:WRONG]] = True
    # A shift by 1 to 9 (modulo 10) gives any class but the right one.
    shift = torch.randint(1, 10, (TRAINING,), generator=generator)
    labels = truth.clone()
    labels[:TRAINING] += wrong * shift
    labels %= 10

    test_start = TRAINING + VALIDATION
    return Digits(
        training=TensorDataset(inputs[:TRAINING], labels[:TRAINING]),
        validation=TensorDataset(inputs[TRAINING:test_start], labels[TRAINING:test_start]),
        test=TensorDataset(inputs[test_start:], labels[test_start:]),
        truth=truth[:TRAINING],
        wrong=wrong,
    )


def task() -> backtrail.Task:
    """A small network with new weights, the same ones every time, on the training digits."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.GELU(),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Linear(128, 10),
    )
    return backtrail.classification(model, digits().training)


def queries() -> Query:
    """One query: the mean loss on the validation digits."""
    return backtrail.Loss(digits().validation, aggregate="mean")


def fit(learner: backtrail.Task, folder: Path | None = None) -> float:
    """Train the model of a task, and record the training if a folder is given.

    Returns:
        The time it took, in seconds.
    """
    # Adam's first update is g / (|g| + eps). Where |g| is below about 1e-6, size and sign of a
    # float32 gradient are mostly rounding.
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=RATE, eps=1e-6)
    generator = torch.Generator().manual_seed(SEED)
    loader = DataLoader(learner.data, BATCH, shuffle=True, generator=generator)
    start = perf_counter()
    if folder is None:
        _train(learner.model, loader, optimizer)
    else:
        # With a recorder, the loop differs only in what it loops over.
        every_epoch = backtrail.Epochs()
        with backtrail.Recorder(folder, learner, optimizer, checkpoints=every_epoch) as recorder:
            _train(learner.model, recorder.watch(loader), optimizer)
    return perf_counter() - start


def _train(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
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
