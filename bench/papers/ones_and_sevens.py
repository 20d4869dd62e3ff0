"""The set-up of the tracker's paper (arXiv 2502.10793): ones against sevens of MNIST.

256 images to train on and 256 to validate. d-8-1 with ReLU and one score a row (binary
cross-entropy), plain SGD in batches of 64 for 21 epochs, and a penalty of half of 1e-3 times the
squared weights. The published rate of 5e-4 hardly trains; "trained" takes 0.05 instead. Data,
flips, weights and order all follow from the seed; everything is in float64. MNIST from the folder
BACKTRAIL_DATA, else the ones and sevens of scikit-learn's digits, 180 and 180. Recordings are kept
in runs/papers/ones-and-sevens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from bench import data

FOLDER = Path("runs/papers/ones-and-sevens")
ROWS, HIDDEN, SLOTS, EPOCHS, ALPHA = 256, 8, 64, 21, 1e-3
PUBLISHED, TRAINED = 5e-4, 0.05  # learning rates


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Ones (label 0) and sevens (label 1), drawn by the seed: to train on, and to ask about."""
    whole = data.mnist_rows(10_000, 0)[0] if data.folder("mnist") else data.digits(1797, 0)[0]
    inputs, labels = whole.tensors
    ours = torch.nonzero((labels == 1) | (labels == 7))[:, 0]
    order = ours[torch.randperm(len(ours), generator=torch.Generator().manual_seed(seed))]
    rows = min(ROWS, len(order) // 2)
    parts = order[:rows], order[rows : 2 * rows]
    first, second = (
        TensorDataset(inputs[part].double(), (labels[part] == 7).long()) for part in parts
    )
    return first, second


def flip(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Bool[np.ndarray, " sample"]]:
    """The labels with a share of them turned round, and which."""
    mask = np.zeros(len(labels), dtype=bool)
    mask[np.random.default_rng(seed).permutation(len(labels))[: round(share * len(labels))]] = True
    return torch.where(torch.from_numpy(mask), 1 - labels, labels), mask


def loss(outputs: Tensor, batch: Any) -> Tensor:
    """Binary cross-entropy of every row."""
    return binary_cross_entropy_with_logits(outputs[:, 0], batch[1].to(outputs), reduction="none")


def drawn(outputs: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
    """The same with labels drawn from the model."""
    chances = outputs.detach().sigmoid()[:, 0]
    return loss(outputs, (batch[0], torch.bernoulli(chances, generator=generator)))


def penalty(params: dict[str, Tensor]) -> Tensor:
    """Half of alpha times the squared length of all weights."""
    return ALPHA / 2 * torch.stack([tensor.square().sum() for tensor in params.values()]).sum()


def task_on(rows: TensorDataset, seed: int) -> backtrail.Task:
    """Model, data and loss."""
    torch.manual_seed(seed)
    width = rows.tensors[0].shape[1]
    model = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)).double()
    return backtrail.Task(model, rows, loss, penalty=penalty, draw=drawn)


def recorded(
    seed: int, *, trained: bool, flipped: float = 0.0
) -> tuple[backtrail.Run, TensorDataset, Bool[np.ndarray, " sample"]]:
    """The recorded training, validation rows (with right labels), and which labels are wrong."""
    rows, validation = digits(seed)
    labels, mask = flip(rows.tensors[1], flipped, seed)
    task = task_on(TensorDataset(rows.tensors[0], labels), seed)
    folder = FOLDER / f"{'trained' if trained else 'published'}-{flipped:g}-{seed}"
    if not folder.exists():
        _train(task, folder, TRAINED if trained else PUBLISHED)
    return backtrail.open_run(folder, task), validation, mask


def _train(task: backtrail.Task, folder: Path, rate: float) -> None:
    optimizer = torch.optim.SGD(task.model.parameters(), lr=rate)
    with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Epochs()) as recorder:
        for _ in range(EPOCHS):
            for batch in recorder.watch(DataLoader(task.data, SLOTS, shuffle=True)):
                (
                    loss(task.model(batch[0]), batch).mean()
                    + penalty(dict(task.model.named_parameters()))
                ).backward()
                optimizer.step()
                optimizer.zero_grad()


def accuracy(run: backtrail.Run, rows: TensorDataset) -> float:
    """Share of rows that the result of a training reads rightly."""
    state, (inputs, labels) = run.state(run.steps), rows.tensors
    outputs, _ = run.task.outputs(state.params, state.buffers, (inputs, labels))
    return float(((outputs[:, 0] > 0) == labels).double().mean())
