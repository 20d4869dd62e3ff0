"""A task that does not explain a run is refused by everything that answers from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import ReplayMismatch, WrongData

ROWS = 24
Loss = Callable[[Any, Any], torch.Tensor]


def data(corrected: int | None = None) -> TensorDataset:
    """Rows and labels; one label may have been corrected since."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, 5, generator=draw)
    labels = torch.randint(2, (ROWS,), generator=draw)
    if corrected is not None:
        labels[corrected] = 1 - labels[corrected]
    return TensorDataset(inputs, labels)


def net(activation: type[nn.Module] = nn.GELU) -> nn.Module:
    """A small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 2))


def loss(smoothing: float = 0.0) -> Loss:
    """Cross-entropy of every row."""

    def of_rows(outputs: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(outputs, batch[1], reduction="none", label_smoothing=smoothing)

    return of_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded training; only its first and its last state are on disk."""
    path = tmp_path_factory.mktemp("explained") / "run"
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    task = backtrail.Task(model, data(), loss())
    with backtrail.Recorder(path, task, optimizer) as recorder:
        for _ in range(2):
            for batch in recorder.watch(DataLoader(data(), batch_size=6)):
                loss()(model(batch[0]), batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    return path


OTHER_TASKS: dict[str, Callable[[], backtrail.Task]] = {
    "label smoothing": lambda: backtrail.Task(net(), data(), loss(0.1)),
    "sum": lambda: backtrail.Task(net(), data(), loss(), reduce="sum"),
    "another activation": lambda: backtrail.Task(net(nn.ReLU), data(), loss()),
    # Row 20 is in the last batch of an epoch, which step 0 does not read.
    "a corrected label": lambda: backtrail.Task(net(), data(corrected=20), loss()),
    "a penalty": lambda: backtrail.Task(
        net(), data(), loss(), penalty=lambda p: 0.01 * p["0.weight"].square().sum()
    ),
    "clipping": lambda: backtrail.Task(net(), data(), loss(), clip=backtrail.ClipNorm(0.01)),
}
QUERIES = backtrail.Parameter("0.bias", [0])
ANSWERS: dict[str, Callable[[backtrail.Run], object]] = {
    "DIT": lambda run: backtrail.DIT().attribute(run, QUERIES),
    "TracIn": lambda run: backtrail.TracIn().attribute(run, QUERIES),
    "GradientDot": lambda run: backtrail.GradientDot().attribute(run, QUERIES),
    "DVE": lambda run: backtrail.DataValueEmbedding(fisher="empirical", rank=4).embed(run),
    "DiffIn": lambda run: backtrail.DiffIn().attribute(run, QUERIES),
    "leave_one_out": lambda run: backtrail.leave_one_out(run, QUERIES, samples=[3]),
    "find_mislabeled": lambda run: backtrail.find_mislabeled(run, method="loss"),
    "forget": lambda run: backtrail.forget(run, [3]),
    "select_coreset": lambda run: backtrail.select_coreset(run, 0.5, method="loss"),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("task", OTHER_TASKS)
def test_another_task_is_refused(task: str, answer: str, folder: Path) -> None:
    """No number is given about a training that the task does not reproduce."""
    run = backtrail.open_run(folder, OTHER_TASKS[task]())
    with pytest.raises((ReplayMismatch, WrongData)):
        ANSWERS[answer](run)


def test_the_task_of_the_training_is_answered(folder: Path) -> None:
    """The same calls answer with the task of the training."""
    run = backtrail.open_run(folder, backtrail.Task(net(), data(), loss()))
    for name, answer in ANSWERS.items():
        if name not in {"find_mislabeled"}:
            answer(run)


def test_a_schedule_outside_the_batch_is_found(tmp_path: Path) -> None:
    """A weight of the loss that changed while training is not what it was: a later step differs."""
    weight = [1.0]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def scheduled(outputs: Any, batch: Any) -> torch.Tensor:
        return weight[0] * loss()(outputs, batch)

    task = backtrail.Task(model, data(), scheduled)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for step, batch in enumerate(recorder.watch(DataLoader(data(), batch_size=6))):
            weight[0] = 1.0 + step
            scheduled(model(batch[0]), batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    weight[0] = 1.0
    run = backtrail.open_run(tmp_path / "run", task)
    with pytest.raises(ReplayMismatch, match="Step 1 replays differently"):
        backtrail.leave_one_out(run, QUERIES, samples=[3])
    with pytest.raises(ReplayMismatch, match="Step 1 replays differently"):
        backtrail.DIT().attribute(run, QUERIES)


def test_a_tolerance_can_be_chosen(folder: Path) -> None:
    """For a task that computes the same on another device, say how much it may differ."""
    task = backtrail.Task(net(), data(), loss(0.01))
    with pytest.raises(ReplayMismatch):
        backtrail.DIT().attribute(backtrail.open_run(folder, task), QUERIES)
    run = backtrail.open_run(folder, task, tolerance=0.5)
    assert backtrail.DIT().attribute(run, QUERIES).values().any()
    with pytest.raises(backtrail.BacktrailError, match=r"Invalid tolerance=-1\.0"):
        backtrail.open_run(folder, task, tolerance=-1.0)
