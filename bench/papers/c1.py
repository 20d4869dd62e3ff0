"""C1: Diff-In's two forms against leave-one-out on a narrow ResNet, and how retraining varies.

1,000 CIFAR-10 images at half size, a ResNet of width 16 with BatchNorm, SGD with rate 0.1 in
batches of 64, 6 epochs; 30 samples left out; five states. Noise floor: the same 30 removals trained
again in float32, whose rounding alone parts it from float64. The exact sweep is beside it, through
ReLU and batch statistics.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import backtrail
from backtrail import stats
from bench import data
from bench.papers import classifier
from bench.papers.rows import Figures, Row

SAMPLES, SLOTS, EPOCHS, REMOVALS, WIDTH = 1000, 64, 6, 30, 16


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and around them."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.first, self.second = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[slot, channel, row, column] to the same."""
        return relu(x + self.second(self.two(relu(self.first(self.one(x))))))


def resnet(channels: int) -> nn.Module:
    """Three blocks at half the pictures' resolution."""
    stem = (
        nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
    )
    blocks = (Residual(WIDTH) for _ in range(3))
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)
    )


def recorded(seed: int) -> tuple[backtrail.Run, backtrail.Loss]:
    """The training, and the mean loss of 200 other pictures."""
    train, test, _ = data.cifar(SAMPLES)
    torch.manual_seed(seed)
    model = resnet(train.tensors[0].shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = classifier.recorded(
        model, optimizer, train, slots=SLOTS, epochs=EPOCHS, checkpoints=backtrail.Epochs()
    )
    return run, backtrail.Loss(test, aggregate="mean")


def measure(seed: int) -> Figures:
    """Signed Pearson of everything with leave-one-out in float64."""
    run, query = recorded(seed)
    removed = np.random.default_rng(seed).choice(run.samples, REMOVALS, replace=False).tolist()
    actual = backtrail.leave_one_out(run, query, samples=removed, batch=8)
    again = backtrail.leave_one_out(run, query, samples=removed, batch=8, dtype=None)
    found: Figures = {}
    for name, method in (
        ("published", backtrail.DiffIn(form="published")),
        ("corrected", backtrail.DiffIn(form="corrected")),
        ("exact sweep", backtrail.DIT()),
        ("Gauss-Newton sweep", backtrail.DIT(curvature=backtrail.GaussNewton())),
    ):
        total = method.attribute(run, query).total()[:, -1, removed].astype(np.float64)
        found[f"Pearson, {name}"] = float(stats.pearson(total, actual)[0])
    found["Pearson, float32 with float64"] = float(stats.pearson(again, actual)[0])
    return found


ROWS = (
    Row(
        "C1",
        "ResNet of width 16, 1,000 CIFAR-10 images",
        measure,
        3,
        {"Pearson, published": "> .7"},
    ),
)
