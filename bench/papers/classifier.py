"""A classifier trained and recorded by the plainest of loops."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail


def recorded(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: TensorDataset,
    *,
    slots: int,
    epochs: int,
    checkpoints: backtrail.Every | backtrail.Epochs,
) -> backtrail.Run:
    """The training, in shuffled batches."""
    task, folder = backtrail.classification(model, rows), Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer, checkpoints=checkpoints) as recorder:
        for _ in range(epochs):
            for inputs, labels in recorder.watch(DataLoader(rows, slots, shuffle=True)):
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder, task)
