"""A training with planted culprits: noisy copies of the query rows, with a wrong label."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.run.run import Run
from bench.data import digits, folder, unpacked

CLEAN = 1000  # training rows with their own labels
QUERIES = 12
COPIES = 2  # culprits of each query
FIRST_QUERY = 5000  # row of MNIST's test set
NOISE = 0.5  # standard deviation added to a copy, with pixels of about unit variance
SLOTS = 64


@dataclass(frozen=True)
class Culprits:
    """Training rows and query rows.

    Attributes:
        train: Clean rows first, then the culprits of each query.
        asked: The query rows with the wrong label that their culprits have.
        about: What the data are.
    """

    train: TensorDataset
    asked: TensorDataset
    about: str

    def of_query(self, query: int) -> set[int]:
        """Rows of a query's culprits."""
        first = CLEAN + query * COPIES
        return set(range(first, first + COPIES))

    @property
    def all_culprits(self) -> list[int]:
        """Rows of all culprits."""
        return list(range(CLEAN, CLEAN + QUERIES * COPIES))


def planted() -> Culprits:
    """MNIST's test set from the folder BACKTRAIL_DATA, or scikit-learn's digits without it."""
    inputs, labels, about = _rows()
    generator = np.random.default_rng(0)
    rows = slice(-QUERIES, None) if len(inputs) < FIRST_QUERY + QUERIES else _query_rows()
    clean = inputs[rows]
    wrong = (labels[rows] + 1 + generator.integers(0, 8, QUERIES)) % 10
    wrong = np.where(wrong == labels[rows], (wrong + 1) % 10, wrong)
    noise = generator.normal(0, NOISE, (QUERIES * COPIES, inputs.shape[1])).astype(np.float32)
    copies = np.repeat(clean, COPIES, axis=0) + noise
    train_inputs = np.concatenate([inputs[:CLEAN], copies])
    train_labels = np.concatenate([labels[:CLEAN], np.repeat(wrong, COPIES)])
    train = TensorDataset(torch.tensor(train_inputs), torch.tensor(train_labels))
    asked = TensorDataset(torch.tensor(clean), torch.tensor(wrong))
    return Culprits(train, asked, about)


def _query_rows() -> slice:
    return slice(FIRST_QUERY, FIRST_QUERY + QUERIES)


def _rows() -> tuple[Float[np.ndarray, "row pixel"], Int64[np.ndarray, " row"], str]:
    place = folder("mnist")
    if place is not None:
        images, labels = unpacked(place)
        pixels = images.flatten(1).numpy().astype(np.float32) / 255
        return (pixels - 0.1307) / 0.3081, labels.numpy(), "MNIST"
    train, test, about = digits()
    inputs = torch.cat([train.tensors[0], test.tensors[0]])
    standard = (inputs - inputs.mean()) / inputs.std()
    targets = torch.cat([train.tensors[1], test.tensors[1]])
    return standard.numpy(), targets.numpy(), about


def recorded(data: Culprits, path: Path, *, epochs: int, lr: float, momentum: float) -> Run:
    """A perceptron trained by SGD on batches of 64."""
    pixels = data.train.tensors[0].shape[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(pixels, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    task = backtrail.classification(model, data.train)
    with backtrail.Recorder(path, task, optimizer) as recorder:
        for _ in range(epochs):
            # The same order in every epoch.
            order = torch.Generator().manual_seed(0)
            loader = DataLoader(data.train, SLOTS, shuffle=True, generator=order)
            for inputs, labels in recorder.watch(loader):
                _loss(model, inputs, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(path, task)


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(inputs), labels)
