"""A small training loop with or without a recorder, which also saves the states it goes through."""

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

ROWS = 22
FEATURES = 3
CLASSES = 3
ORDER = {"shuffle": False}
Tensors = dict[str, Tensor]
Watch = Callable[[Any], Any]  # from a loader to what the loop reads its batches from


def rows(count: int = ROWS, seed: int = 0) -> TensorDataset:
    """Draw inputs `[row, feature]` and labels `[row]`."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return TensorDataset(inputs, labels)


def mlp(*between: nn.Module) -> nn.Sequential:
    """Make two linear layers with other modules between them, always from the same weights."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(FEATURES, 8), *between, nn.Tanh(), nn.Linear(8, CLASSES))


def stochastic_mlp() -> nn.Sequential:
    """Make a network whose forward pass draws random numbers and changes buffers."""
    return mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Make an Adam over all parameters of a model."""
    return torch.optim.Adam(model.parameters(), lr=0.02)


def backward(loss: Any) -> None:
    """Call `loss.backward()`, for which torch declares no types."""
    loss.backward()


def copied(tensors: Tensors) -> Tensors:
    """Copy tensors, so that later steps do not change them."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bytes_of(state: State) -> dict[str, bytes]:
    """Return every tensor of a state as bytes, to be compared bit for bit."""
    tensors: Tensors = {}
    for name, tensor in state.params.items():
        tensors[f"parameter {name}"] = tensor
    for name, tensor in state.buffers.items():
        tensors[f"buffer {name}"] = tensor
    for name, moments in state.moments.items():
        for key, tensor in moments.items():
            tensors[f"moment {key} of {name}"] = tensor
    found = {}
    for name, tensor in tensors.items():
        content = tensor.detach().contiguous().numpy().tobytes()
        found[name] = str(tensor.dtype).encode() + content
    return found


@dataclass
class Loop:
    """A training: its objects, and the states that it went through.

    Attributes:
        model: The model that is trained.
        optimizer: Its optimizer.
        data: The training set.
        options: Further arguments of `backtrail.classification`.
        states: A copy of the state before every step that `saving_states` was used for.
    """

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
        """Make the training of a model by an optimizer of its parameters."""
        return cls(model, optimizer(model), **more)

    def task(self) -> backtrail.Task:
        """Describe the training to backtrail."""
        return backtrail.classification(self.model, self.data, **self.options)

    def recorder(self, path: Path, **options: Any) -> backtrail.Recorder:
        """Make a recorder of the training, by default with a checkpoint every four steps."""
        chosen: dict[str, Any] = {"checkpoints": backtrail.Every(4)}
        chosen.update(options)
        return backtrail.Recorder(path, self.task(), self.optimizer, **chosen)

    def loader(self, **options: Any) -> "DataLoader[Any]":
        """Make a loader of batches of 4, by default shuffled; the last batch has 2 rows."""
        chosen: dict[str, Any] = {"batch_size": 4, "shuffle": True}
        chosen.update(options)
        return DataLoader(self.data, **chosen)

    def backward(self, batch: Sequence[Tensor]) -> None:
        """Make one forward and one backward pass on a batch of inputs, labels and perhaps more."""
        backward(cross_entropy(self.model(batch[0]), batch[1]))

    def step(self) -> None:
        """Make one step of the optimizer, and zero the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def current_state(self, buffers: Tensors | None = None) -> State:
        """Copy everything that a step reads and writes; `buffers` stand in for the model's."""
        params = copied(dict(self.model.named_parameters()))
        if buffers is None:
            buffers = copied(dict(self.model.named_buffers()))
        moments = {}
        for name, parameter in self.model.named_parameters():
            stored = self.optimizer.state.get(parameter)
            if stored:
                tensors = {key: value for key, value in stored.items() if isinstance(value, Tensor)}
                moments[name] = copied(tensors)
        return State(params, buffers, moments)

    def saving_states(self, batches: Iterator[Any] | Any) -> Iterator[Any]:
        """Yield the batches, and copy the state before each of them to `states`."""
        for batch in batches:
            self.states.append(self.current_state())
            yield batch

    def train(self, watch: Watch, loader: Any = None, epochs: int = 2) -> None:
        """Train with one step a batch, and save the state before every step."""
        loader = self.loader() if loader is None else loader
        for _ in range(epochs):
            for batch in self.saving_states(watch(loader)):
                self.backward(batch)
                self.step()


def recorded_loop(
    loop: Loop,
    path: Path,
    train: Callable[[Watch], None] | None = None,
    **options: Any,
) -> Run:
    """Record a training, by default that of `loop.train`, and verify that a replay agrees."""
    train = train or loop.train
    with loop.recorder(path, **options) as recorder:
        train(recorder.watch)
    loop.states.append(loop.current_state())
    run = backtrail.open_run(path, loop.task())
    assert run.verify().difference < 1e-5
    return run


def autocast_training(
    loop: Loop, *, outside: bool = False, full: tuple[int, ...] = ()
) -> Callable[[Watch], None]:
    """Return a training loop of three epochs under bfloat16 autocast.

    Args:
        loop: What is trained.
        outside: Whether the loss is taken outside of autocast.
        full: Numbers of the batches of an epoch that are not under autocast.
    """

    def train(watch: Watch) -> None:
        for _ in range(3):
            for number, batch in enumerate(loop.saving_states(watch(loop.loader()))):
                with torch.autocast("cpu", torch.bfloat16, enabled=number not in full):
                    outputs = loop.model(batch[0])
                    loss = cross_entropy(outputs, batch[1])
                if outside:
                    loss = cross_entropy(outputs, batch[1])
                backward(loss)
                loop.step()

    return train


def watch_of(recorder: backtrail.Recorder | None) -> Watch:
    """Return the recorder's `watch`; without a recorder, what returns the loader as it is."""
    if recorder is None:
        return lambda loader: loader
    return recorder.watch


def recording(recorder: backtrail.Recorder | None) -> AbstractContextManager[Any]:
    """Return the recorder as a context manager; without a recorder, one that does nothing."""
    return nullcontext() if recorder is None else recorder


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows to which a function adds new noise every time they are read."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.rows = rows()
        self.noise = noise

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one row with new noise."""
        inputs, label = self.rows[index]
        return inputs + self.noise(), label


def sample_numbers(run: Run) -> list[list[tuple[int, ...]]]:
    """Return the row numbers of every batch of every step."""
    return [[batch.samples for batch in step.fed] for step in run.log]


def sequential_batches(count: int, size: int) -> list[tuple[int, ...]]:
    """Return the row numbers of the batches of a loader that does not shuffle."""
    return [tuple(range(first, min(first + size, count))) for first in range(0, count, size)]


def refused(error: type[BacktrailError], *words: str) -> Any:
    """Expect an error whose message has all these words in this order."""
    pattern = ".*".join(re.escape(word) for word in words)
    return pytest.raises(error, match=f"(?s){pattern}")
