"""A small training loop with and without a recorder beside it, and the states that the loop really went through."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

import backtrail
from backtrail.errors import BacktrailError
from backtrail.run.run import Run
from backtrail.step.state import State

ROWS, FEATURES, CLASSES = 22, 3, 3
Tensors = dict[str, Tensor]
ORDER = {"shuffle": False}


def rows(count: int = ROWS, seed: int = 0) -> TensorDataset:
    """Random inputs and labels."""
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, FEATURES, generator=draw),
        torch.randint(CLASSES, (count,), generator=draw),
    )


def mlp(*between: nn.Module) -> nn.Sequential:
    """Two layers with other modules between them, always from the same weights."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(FEATURES, 8), *between, nn.Tanh(), nn.Linear(8, CLASSES))


def moody() -> nn.Sequential:
    """A model that draws random numbers and moves buffers in its forward pass."""
    return mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The usual optimizer."""
    return torch.optim.Adam(model.parameters(), lr=0.02)


def backward(loss: Any) -> None:
    """A backward pass, for which torch declares no types."""
    loss.backward()


def copied(tensors: Tensors) -> Tensors:
    """Tensors that later steps cannot reach."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bits(state: State) -> dict[str, bytes]:
    """Every tensor of a state as bytes, under one flat name."""
    moments = {
        f"{name}:{key}": m for name, tree in state.moments.items() for key, m in tree.items()
    }
    tensors = (
        {f"p:{n}": t for n, t in state.params.items()}
        | {f"b:{n}": t for n, t in state.buffers.items()}
        | moments
    )
    return {
        name: str(t.dtype).encode() + t.detach().contiguous().numpy().tobytes()
        for name, t in tensors.items()
    }


@dataclass
class Loop:
    """A training in progress: its objects, and what a test wants to know of it afterwards."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Any = field(default_factory=rows)
    options: dict[str, Any] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
        **more: Any,
    ) -> "Loop":
        """A training of a model."""
        return cls(model, optimizer(model), **more)

    def task(self) -> backtrail.Task:
        """What backtrail is told of it."""
        return backtrail.classification(self.model, self.data, **self.options)

    def recorder(self, path: Path, **options: Any) -> backtrail.Recorder:
        """A recorder beside it."""
        return backtrail.Recorder(
            path, self.task(), self.optimizer, **{"checkpoints": backtrail.Every(4)} | options
        )

    def loader(self, **options: Any) -> "DataLoader[Any]":
        """Shuffled batches; the last is short."""
        return DataLoader(self.data, **{"batch_size": 4, "shuffle": True} | options)

    def backward(self, batch: Sequence[Tensor]) -> None:
        """One forward and one backward pass."""
        backward(cross_entropy(self.model(batch[0]), batch[1]))

    def step(self) -> None:
        """Note the state before the step, then make it."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def now(self, buffers: Tensors | None = None) -> State:
        """A copy of everything a step reads and writes."""
        moments = {
            name: copied(
                {k: v for k, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
            )
            for name, p in self.model.named_parameters()
            if self.optimizer.state.get(p)
        }
        found = copied(dict(self.model.named_buffers())) if buffers is None else buffers
        return State(copied(dict(self.model.named_parameters())), found, moments)

    def noted(self, batches: Iterator[Any] | Any) -> Iterator[Any]:
        """The batches, with a copy of the state before each of them and after the last."""
        for batch in batches:
            self.states.append(self.now())
            yield batch

    def train(self, watch: Callable[[Any], Any], loader: Any = None, epochs: int = 2) -> None:
        """The plainest of loops: a step per batch."""
        loader = self.loader() if loader is None else loader
        for _ in range(epochs):
            for batch in self.noted(watch(loader)):
                self.backward(batch)
                self.step()


def recorded(
    loop: Loop,
    path: Path,
    train: Callable[[Callable[[Any], Any]], None] | None = None,
    **options: Any,
) -> Run:
    """The loop's recording, opened and verified to be almost exact."""
    with loop.recorder(path, **options) as recorder:
        (train or loop.train)(recorder.watch)
    loop.states.append(loop.now())
    run = backtrail.open_run(path, loop.task())
    assert run.verify().difference < 1e-5
    return run


def autocast_training(
    loop: Loop, *, outside: bool = False, full: tuple[int, ...] = ()
) -> Callable[[Callable[[Any], Any]], None]:
    """The plain loop under autocast, but for some batches; or with the loss outside of it."""

    def train(watch: Callable[[Any], Any]) -> None:
        for _ in range(3):
            for number, batch in enumerate(loop.noted(watch(loop.loader()))):
                with torch.autocast("cpu", torch.bfloat16, enabled=number not in full):
                    outputs = loop.model(batch[0])
                    loss = cross_entropy(outputs, batch[1])
                backward(cross_entropy(outputs, batch[1]) if outside else loss)
                loop.step()

    return train


def watching(recorder: backtrail.Recorder | None) -> Callable[[Any], Any]:
    """The recorder's `watch`, or nothing in its place."""
    return (lambda loader: loader) if recorder is None else recorder.watch


def beside(recorder: backtrail.Recorder | None) -> AbstractContextManager[Any]:
    """The recorder as a context, or nothing in its place."""
    return nullcontext() if recorder is None else recorder


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise from a function that draws it anew at every reading."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.rows, self.noise = rows(), noise

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One noisy row."""
        inputs, label = self.rows[index]
        return inputs + self.noise(), label


def samples(run: Run) -> list[list[tuple[int, ...]]]:
    """Row numbers by step and batch."""
    return [[fed.samples for fed in step.fed] for step in run.log]


def in_order(count: int, size: int) -> list[tuple[int, ...]]:
    """Row numbers of the batches of a loader that does not shuffle."""
    return [tuple(range(first, min(first + size, count))) for first in range(0, count, size)]


def refused(error: type[BacktrailError], *words: str) -> Any:
    """Expect an error whose message has all these words in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(word) for word in words))
