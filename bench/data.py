"""Data for the benchmark tables: from the folder BACKTRAIL_DATA, or from installed packages."""

import gzip
import inspect
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import TensorDataset

Split = tuple[TensorDataset, TensorDataset, str]  # to train on, to ask about, and what it is


def folder(name: str) -> Path | None:
    """A subfolder of the folder that BACKTRAIL_DATA names, if both are there."""
    place = Path(os.environ.get("BACKTRAIL_DATA", "")) / name
    return place if "BACKTRAIL_DATA" in os.environ and place.is_dir() else None


def split(
    inputs: Tensor, targets: Tensor, *, train: int, test: int
) -> tuple[TensorDataset, TensorDataset]:
    """Two disjoint parts, drawn with a fixed seed."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    parts = order[:train], order[train : train + test]
    first, second = (TensorDataset(inputs[part], targets[part]) for part in parts)
    return first, second


def digits(train: int = 1437, test: int = 360) -> Split:
    """scikit-learn's handwritten digits, brightness 0 to 1, as rows of 64."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return *split(x, y, train=train, test=test), "scikit-learn's digits"


def pictures(train: int, test: int = 200) -> Split:
    """Digits as pictures [1, 8, 8]."""
    first, second, about = digits(train, test)
    shaped = (
        TensorDataset(part.tensors[0].view(-1, 1, 8, 8), part.tensors[1])
        for part in (first, second)
    )
    return *shaped, about  # type: ignore[return-value]


def mnist(train: int, test: int = 200) -> Split:
    """MNIST at half size, [1, 14, 14]; digits where it is not at hand."""
    place = folder("mnist")
    if place is None:
        return pictures(train, test)
    return *halved(*unpacked(place), train=train, test=test), "MNIST at 14 x 14"


def mnist_rows(train: int, test: int = 200) -> Split:
    """MNIST as rows of 784, brightness 0 to 1; digits where it is not at hand, and then fewer."""
    place = folder("mnist")
    if place is None:
        return digits(min(train, 1400), test)
    images, labels = unpacked(place)
    return *split(images.flatten(1) / 255, labels, train=train, test=test), "MNIST"


def unpacked(place: Path) -> tuple[Tensor, Tensor]:
    """The images [1, 28, 28] in bytes, and the labels."""
    raw = [
        np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)
        for file in sorted(place.glob("*.gz"))
    ]
    return torch.tensor(raw[0][16:].reshape(-1, 1, 28, 28)), torch.tensor(
        raw[1][8:].astype(np.int64)
    )


def cifar(train: int, test: int = 200) -> Split:
    """CIFAR-10 at half size, [3, 16, 16]; digits where it is not at hand."""
    place = folder("cifar10")
    if place is None:
        return pictures(train, test)
    with np.load(place / "cifar10_12k.npz") as file:
        images, labels = file["x_train"], file["y_train"]
    x, y = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels.astype(np.int64).ravel())
    return *halved(x, y, train=train, test=test), "CIFAR-10 at 16 x 16"


def halved(
    images: Tensor, labels: Tensor, *, train: int, test: int
) -> tuple[TensorDataset, TensorDataset]:
    """Two disjoint parts of pictures in bytes, at half their size, brightness -0.5 to 0.5."""
    parts = split(images, labels, train=train, test=test)
    first, second = (
        TensorDataset(avg_pool2d(x / 255, 2) - 0.5, y) for x, y in (part.tensors for part in parts)
    )
    return first, second


def letters(train: int, test: int = 64, *, context: int = 32) -> Split:
    """Sequences of ASCII and the same shifted by one: Shakespeare, or torch's own source."""
    place = folder("shakespeare")
    source = (
        (place / "input.txt").read_bytes()
        if place
        else inspect.getsource(torch.nn.functional).encode()
    )
    rows = train + test
    ids = (
        torch.frombuffer(bytearray(source[: rows * context + 1]), dtype=torch.uint8)
        .long()
        .clamp(max=127)
    )
    parts = split(ids[:-1].view(rows, context), ids[1:].view(rows, context), train=train, test=test)
    return *parts, "Shakespeare" if place else "source code of torch.nn.functional"
