"""Recorded trainings, opened again as runs."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.run.run import Run
from tests.cases import CASES_BY_NAME, Case, mlp, record, rows


def recorded_run(name: str, folder: Path) -> Run:
    """Record the case of this name into a folder of the same name."""
    return recorded_case(CASES_BY_NAME[name], folder)


def recorded_case(case: Case, folder: Path) -> Run:
    """Record a case into a folder of its name."""
    model = case.built()
    data = rows()
    path = folder / case.name
    record(case, model, data, path)
    return backtrail.open_run(path, case.task(model, data))


def recorded_regression(folder: Path) -> Run:
    """Record one epoch of SGD on a regression of six rows."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 2, generator=draw)
    targets = torch.randn(6, 1, generator=draw)
    data = TensorDataset(inputs, targets)
    task = backtrail.regression(nn.Linear(2, 1), data)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for inputs, targets in recorder.watch(DataLoader(data, 3)):
            (task.model(inputs) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return backtrail.open_run(folder, task)


def recorded_sgd(folder: Path, epochs: int = 4, lr: float = 0.02) -> Run:
    """Record SGD on 24 rows in shuffled batches of 6, with a checkpoint before every step."""
    torch.manual_seed(7)
    model = mlp().double()
    data = rows(count=24)
    task = backtrail.classification(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    path = folder / "run"
    with backtrail.Recorder(path, task, optimizer, checkpoints=backtrail.Every(1)) as recorder:
        for _ in range(epochs):
            for inputs, labels in recorder.watch(DataLoader(data, 6, shuffle=True)):
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(path, task)
