"""The trainings that the table compares methods on, and what every method is given of one."""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from bench import data
from bench.models import GPT, ViT, batchnorm_cnn, mlp

QUICK, ROWS = 4, 256  # queries and samples of a trial
CHECKPOINTS = 10  # that methods which read checkpoints are given

Kind = Literal["mlp", "batchnorm", "attention", "tokens"]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: of its files.
        about: what is trained, in a few words.
        kind: what is peculiar about the model; decides which peers can do it.
        build: makes the model; called after seeding.
        load: makes the data; called with no argument.
        optimizer: makes the optimizer.
        rule: what kind of optimizer that is.
        epochs: passes over the data.
        slots: size of a batch.
        queries: how many test losses are asked about.
        removals: how many samples are left out one at a time.
        groups: how many random groups of 5 % are left out.
    """

    name: str
    about: str
    kind: Kind
    build: Callable[[], nn.Module]
    load: Callable[[], data.Split]
    optimizer: Optimizer
    rule: Literal["plain", "sgd", "adamw"]
    epochs: int = 10
    slots: int = 64
    queries: int = 64
    removals: int = 60
    groups: int = 40

    def quick(self) -> "Case":
        """The same in small, to see whether everything works."""
        return replace(
            self, load=partial(fewer, self.load), epochs=1, queries=QUICK, removals=6, groups=6
        )

    def begin(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimizer as every training starts."""
        torch.manual_seed(0)
        model = self.build()
        return model, self.optimizer(model.parameters())

    def task(self, model: nn.Module, train: TensorDataset) -> backtrail.Task:
        """The training problem as `backtrail` is told of it."""
        return (backtrail.language_model if self.kind == "tokens" else backtrail.classification)(
            model, train
        )

    def loader(self, train: TensorDataset) -> "DataLoader[Any]":
        """The batches; their order follows from the seed that `begin` sets."""
        return DataLoader(train, batch_size=self.slots, shuffle=True)

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[], Iterable[Any]],
    ) -> None:
        """The loop as users write it."""
        for _ in range(self.epochs):
            for inputs, targets in batches():
                cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()

    def train_plainly(self, train: TensorDataset) -> float:
        """Processor seconds of the training with nothing beside it."""
        model, optimizer = self.begin()
        loader = self.loader(train)
        begun = time.process_time()
        self.train(model, optimizer, lambda: loader)
        return time.process_time() - begun

    def train_ready(self, train: TensorDataset) -> float:
        """The same where the batches are ready-made: without the time for collating rows."""
        model, optimizer = self.begin()
        ready = [(inputs, targets) for inputs, targets in self.loader(train)]
        begun = time.process_time()
        self.train(model, optimizer, lambda: ready)
        return time.process_time() - begun

    def record(self, train: TensorDataset, folder: Path) -> float:
        """Processor seconds of the training with a recorder at its default policy."""
        model, optimizer = self.begin()
        loader, task = self.loader(train), self.task(model, train)
        begun = time.process_time()
        with backtrail.Recorder(folder, task, optimizer) as recorder:
            self.train(model, optimizer, lambda: recorder.watch(loader))
        return time.process_time() - begun


def fewer(load: Callable[[], data.Split]) -> data.Split:
    """The first few rows to train on."""
    train, test, about = load()
    return TensorDataset(*(tensor[:ROWS] for tensor in train.tensors)), test, about


@dataclass(frozen=True)
class TrainedCase:
    """A recorded training: what every method is told.

    Attributes:
        case: the training.
        folder: of the recording.
    """

    case: Case
    folder: Path

    @cached_property
    def split(self) -> data.Split:
        """What to train on, what to ask about, and what it is."""
        return self.case.load()

    @property
    def train(self) -> TensorDataset:
        """The training set."""
        return self.split[0]

    def queries(self, count: int) -> TensorDataset:
        """The first rows to ask about; a query is the loss of one of them."""
        return TensorDataset(*(tensor[:count] for tensor in self.split[1].tensors))

    @cached_property
    def run(self) -> backtrail.Run:
        """The recording."""
        return backtrail.open_run(self.folder, self.case.task(self.case.begin()[0], self.train))

    def weights(self, number: int) -> dict[str, Tensor]:
        """A state of the run, as a `state_dict`."""
        state = self.run.state(number, replay=True)
        return {name: tensor.clone() for name, tensor in (state.params | state.buffers).items()}

    @cached_property
    def checkpoints(self) -> list[tuple[dict[str, Tensor], float]]:
        """Evenly spaced states up to the last, each with the learning rate of the step before."""
        numbers = sorted(
            {max(1, self.run.steps * part // CHECKPOINTS) for part in range(1, CHECKPOINTS + 1)}
        )
        return [(self.weights(t), float(self.run.step(t - 1).settings[0]["lr"])) for t in numbers]  # type: ignore[arg-type]

    @cached_property
    def trained(self) -> nn.Module:
        """The model after training, in eval mode; hand out copies of it."""
        model, _ = self.case.begin()
        model.load_state_dict(self.weights(self.run.steps))
        return model.eval()

    def model(self) -> nn.Module:
        """A model of one's own, as it was after training, in eval mode."""
        return copy.deepcopy(self.trained)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of every row `[slot]`; of a sequence, the mean over its tokens."""
        return self.run.task.loss(outputs, (None, targets))


def _headline() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def _gpt() -> nn.Module:
    return GPT(128, 32, layers=2, context=32)


def _cnn() -> nn.Module:
    return batchnorm_cnn(data.mnist(1, 1)[0].tensors[0].shape[1])


def _vit() -> nn.Module:
    shape = tuple(data.cifar(1, 1)[0].tensors[0].shape[1:])
    return ViT(shape, shape[1] // 4)  # type: ignore[arg-type]


HEADLINE = Case(
    name="headline",
    about="MLP 64-64-10, Tanh, SGD lr 0.1",
    kind="mlp",
    build=_headline,
    load=data.digits,
    optimizer=partial(torch.optim.SGD, lr=0.1),
    rule="plain",
)


def _one_epoch(activation: type[nn.Module], rate: float) -> Case:
    """A small network that sees every sample once, so that a sample and its visit are the same."""

    def build() -> nn.Module:
        width = data.mnist_rows(1, 1)[0].tensors[0].shape[1]
        return nn.Sequential(
            nn.Linear(width, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 10)
        )

    return Case(
        name=f"once-{activation.__name__.lower()}-{rate:.0e}",
        about=(
            f"MLP 784-16-16-10, {activation.__name__}, AdamW (0.9, 0.95) lr {rate:.0e}, one epoch"
        ),
        kind="mlp",
        build=build,
        load=partial(data.mnist_rows, 6000),
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95)),
        rule="adamw",
        epochs=1,
        queries=100,
        removals=150,
    )


MODELS: dict[
    str, tuple[str, Kind, Callable[[], nn.Module], Callable[[], data.Split], int, int]
] = {  # epochs, queries
    "mlp-64": ("MLP 64-64-10, Tanh", "mlp", _headline, data.digits, 10, 64),
    "mlp-128": ("MLP 64-128-128-10, GELU", "mlp", mlp, data.digits, 10, 64),
    "cnn": ("CNN with BatchNorm, GELU", "batchnorm", _cnn, partial(data.mnist, 1000), 5, 16),
    "vit": (
        "vision transformer, 2 layers, width 32",
        "attention",
        _vit,
        partial(data.cifar, 1000),
        4,
        16,
    ),
    "gpt": (
        "GPT, 2 layers, width 32, context 32",
        "tokens",
        _gpt,
        partial(data.letters, 512),
        4,
        16,
    ),
}
RULES: list[tuple[Literal["sgd", "adamw"], str, Optimizer]] = [
    ("sgd", "SGD lr 0.05, momentum 0.9", partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    ("adamw", "AdamW lr 1e-3", partial(torch.optim.AdamW, lr=1e-3)),
]
CASES = [HEADLINE] + [
    Case(
        f"{name}-{rule}",
        f"{about}, {what}",
        kind,
        build,
        load,
        optimizer,
        rule,
        epochs,
        queries=queries,
    )
    for name, (about, kind, build, load, epochs, queries) in MODELS.items()
    for rule, what, optimizer in RULES
]
CASES += [
    _one_epoch(activation, rate) for activation in (nn.GELU, nn.ReLU) for rate in (1e-3, 1e-4, 1e-5)
]
