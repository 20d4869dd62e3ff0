"""Models that compute activations again in their backward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

import backtrail
from tests.loops import CLASSES, FEATURES, Loop, recorded_loop


class Net(nn.Module):
    """Two layers with dropout, of which the middle may be computed again."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(5)
        nn.Module.__init__(self)
        self.way = way
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.first(x)
        if self.way == "once":
            return self.last(self.middle(x))
        return self.last(
            checkpoint.checkpoint(self.middle, x, use_reentrant=self.way == "reentrant")
        )


def influence(way: str, path: Path) -> np.ndarray:
    """Of a training that draws the same random numbers either way."""
    loop = Loop.of(Net(way).double())
    loop.data.tensors = (loop.data.tensors[0].double(), loop.data.tensors[1])
    torch.manual_seed(1)
    run = recorded_loop(loop, path)
    return backtrail.DIT().attribute(run, backtrail.Loss(loop.data, samples=[0, 3])).values()


@pytest.mark.parametrize("way", ["reentrant", "later"])
def test_they_are_recorded_and_attributed_like_others(way: str, tmp_path: Path) -> None:
    """In both of torch's ways, with the dropout masks of the loop; the loop itself still computes twice."""
    ways = checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator
    found = influence(way, tmp_path / "twice")
    np.testing.assert_allclose(
        found, influence("once", tmp_path / "once"), rtol=0, atol=1e-12 * np.abs(found).max()
    )
    assert (
        checkpoint.CheckpointFunction,
        checkpoint._checkpoint_without_reentrant_generator,
    ) == ways
