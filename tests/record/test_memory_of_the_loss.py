"""Losses, models and data sets with memory of their own train the same with a recorder."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.errors import BacktrailError, ChangedByCheck
from tests.loops import FEATURES, Loop, adam, backward, bytes_of, mlp, refused, rows
from tests.processes import in_fresh_process

LossFunction = Callable[[Any, Any], Tensor]
calls = 0
SEEN: list[float] = []


def row_losses(outputs: Any, batch: Any) -> Tensor:
    """Cross-entropy of every row."""
    return cross_entropy(outputs, batch[1], reduction="none")


def with_a_global() -> tuple[LossFunction, Callable[[], Any]]:
    """A loss that counts its calls in a global, and logs to a list."""
    global calls  # noqa: PLW0603 - as users write it
    calls = 0
    SEEN.clear()

    def loss(outputs: Any, batch: Any) -> Tensor:
        global calls  # noqa: PLW0603 - as users write it
        calls += 1
        losses = row_losses(outputs, batch)
        SEEN.append(float(losses.detach().mean()))
        return losses

    return loss, lambda: (calls, list(SEEN))


def with_a_closure() -> tuple[LossFunction, Callable[[], Any]]:
    """A loss that follows its mean in a closure: one name assigned anew, one tensor in place."""
    mean = 0.0
    tracked = torch.zeros(2)

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal mean
        losses = row_losses(outputs, batch)
        mean = 0.9 * mean + 0.1 * float(losses.detach().mean())
        tracked.lerp_(losses.detach()[:2], 0.1)
        return losses

    return loss, lambda: (mean, tracked.tolist())


class BufferedLoss(nn.Module):
    """A loss module with a buffer, a counter and an attribute that is assigned anew."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.history: dict[str, list[float]] = {}
        self.count = 0

    def forward(self, outputs: Any, batch: Any) -> Tensor:
        """Follow the mean."""
        losses = row_losses(outputs, batch)
        self.mean.mul_(0.9).add_(0.1 * losses.detach().mean())
        self.count += 1
        self.history.setdefault("mean", []).append(float(self.mean))
        return losses


def with_buffers() -> tuple[LossFunction, Callable[[], Any]]:
    """A loss module."""
    module = BufferedLoss()
    return module, lambda: (float(module.mean), module.count, module.history)


def with_random_numbers() -> tuple[LossFunction, Callable[[], Any]]:
    """A loss that draws numbers which do not matter from four generators."""
    own = np.random.default_rng(4)
    drawn: list[float] = []

    def loss(outputs: Any, batch: Any) -> Tensor:
        draws = random.random() + float(np.random.normal()) + float(torch.randn(()))
        drawn.append(draws + float(own.normal()))
        return row_losses(outputs, batch)

    return loss, lambda: (drawn, random.random(), float(np.random.normal()))


class Slotted:
    """A loss object without a `__dict__`, with a counter of its class."""

    __slots__ = ("count",)
    instances: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        self.count = 0
        Slotted.instances["calls"] = 0

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        """Count."""
        self.count += 1
        Slotted.instances["calls"] += 1
        return row_losses(outputs, batch)


def with_slots() -> tuple[LossFunction, Callable[[], Any]]:
    """An object with slots."""
    counted = Slotted()
    return counted, lambda: (counted.count, dict(Slotted.instances))


LOSSES = [with_a_global, with_a_closure, with_buffers, with_random_numbers, with_slots]


class Counting(nn.Sequential):
    """A model that counts its calls."""

    calls = 0
    of_all = 0

    def forward(self, inputs: Any) -> Any:
        """Count, then call the layers."""
        self.calls += 1
        Counting.of_all += 1
        return super().forward(inputs)


class CountedRows(torch.utils.data.Dataset[Any]):
    """A data set that counts how often it was read."""

    def __init__(self) -> None:
        self.rows = rows()
        self.reads = 0

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Read a row."""
        self.reads += 1
        return self.rows[index]


def trained(make: Any, path: Path | None, capture: Any = None) -> tuple[Any, Any]:
    """Train with or without a recorder; return the bits of the result and the loss's memory."""
    torch.manual_seed(3), np.random.seed(4), random.seed(5)
    loss, memory = make()
    Counting.of_all = 0
    model = Counting(*mlp())
    loop = Loop(model, adam(model), data=CountedRows())
    task = backtrail.Task(model, loop.data, loss)

    def loop_over(batches: Any) -> None:
        for batch in batches:
            backward(loss(model(batch[0]), batch).mean())
            loop.step()

    if path is None:
        for _ in range(2):
            loop_over(loop.loader())
    else:
        with backtrail.Recorder(path, task, loop.optimizer, capture=capture) as recorder:
            for _ in range(2):
                loop_over(recorder.watch(loop.loader()))
    counts = model.calls, Counting.of_all, loop.data.reads
    return bytes_of(loop.current_state()), (memory(), counts)


@pytest.mark.parametrize("make", LOSSES)
def test_a_training_is_the_same_with_a_recorder(make: Any, tmp_path: Path) -> None:
    """Weights, and everything that the loss, the model and the data set remember."""
    # Not here: the run-time type checks of the tests draw from Python's generator.
    in_fresh_process(is_the_same, make, tmp_path / "run")


def is_the_same(make: Any, path: Path) -> None:
    """Train twice."""
    assert trained(make, path) == trained(make, None)


@pytest.mark.parametrize("make", [with_a_global, with_a_closure, with_buffers])
def test_the_same_with_live_capture(make: Any, tmp_path: Path) -> None:
    """Live capture calls the loss at every step."""
    capture = backtrail.DataValueEmbedding(rank=4, fisher="empirical", segments=2)
    weights, (memory, _) = trained(make, tmp_path / "run", capture)
    alone, (alone_memory, _) = trained(make, None)
    assert (weights, memory) == (alone, alone_memory)


def test_memory_that_matters_is_refused(tmp_path: Path) -> None:
    """A loss that is weighted by its own count cannot be replayed."""
    count = 0

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        return row_losses(outputs, batch) * (1 + count)

    with pytest.raises(BacktrailError, match="memory of its own"):
        trained(lambda: (loss, lambda: count), tmp_path / "run")


def numbers() -> Any:
    """Count up."""
    number = 0
    while True:
        yield number
        number += 1


@pytest.mark.parametrize("make", [numbers, itertools.count])
def test_an_iterator_cannot_be_put_back(make: Any, tmp_path: Path) -> None:
    """A loss that advances an iterator is refused at step 0."""
    iterator = make()

    def loss(outputs: Any, batch: Any) -> Tensor:
        next(iterator)
        return row_losses(outputs, batch)

    with refused(ChangedByCheck, "Step 0", "advanced the", "recorder.fed(batch)"):
        trained(lambda: (loss, lambda: None), tmp_path / "run")


def test_hooks_of_the_live_model_keep_their_memory(tmp_path: Path) -> None:
    """A forward hook that logs to a list logs the loop's own calls alone."""
    loop = Loop.of(mlp())
    logged: list[int] = []
    loop.model[0].register_forward_hook(lambda *_: logged.append(len(logged)))
    with loop.recorder(tmp_path / "run") as recorder:
        loop.train(recorder.watch)
    assert logged == list(range(12))
    assert loop.model[0].in_features == FEATURES
