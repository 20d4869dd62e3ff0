"""Small trainings in float64, each with one peculiarity that a derivative has to get right.

The loop below is plain PyTorch. It serves the recorder and the oracle alike: the oracle calls it
again with the weight of one slot nudged, and never touches a line of backtrail.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail

FEATURES, CLASSES, ROWS, STEPS, SLOTS = 4, 3, 9, 5, 3
BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 3, 6], [2, 4, 8]]
Weights = Callable[[int], Tensor]  # the weights of a step's slots


def rows(seed: int = 0, count: int = ROWS) -> TensorDataset:
    """Inputs of which the last feature is always zero, and labels."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=draw, dtype=torch.float64)
    inputs[:, -1] = 0.0
    return TensorDataset(inputs, torch.randint(0, CLASSES, (count,), generator=draw))


class Tied(nn.Module):
    """An embedding whose matrix is also the head's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inward = nn.Linear(FEATURES, CLASSES, bias=False)
        self.middle = nn.Linear(CLASSES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.head.weight = self.inward.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Down, across, and down again."""
        found: Tensor = self.head(torch.tanh(self.middle(torch.tanh(self.inward(inputs)))))
        return found


class Partly(nn.Module):
    """A network with a layer that no forward pass uses."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body, self.unused = mlp(), nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Only the body."""
        found: Tensor = self.body(inputs)
        return found


def mlp() -> nn.Module:
    """Two smooth layers."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.GELU(), nn.Linear(5, CLASSES))


def normed() -> nn.Module:
    """Two layers with BatchNorm between (no bias before it: its gradient would be pure rounding)."""
    return nn.Sequential(
        nn.Linear(FEATURES, 5, bias=False), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, CLASSES)
    )


def with_dropout() -> nn.Module:
    """Two layers with dropout between, whose mask a replay draws again."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.GELU(), nn.Dropout(0.4), nn.Linear(5, CLASSES))


def frozen() -> nn.Module:
    """The first layer does not learn."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


def one_group(
    kind: type[torch.optim.Optimizer], **settings: Any
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An optimizer over all parameters."""
    return lambda model: kind(model.parameters(), **settings)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Weights and biases with other rates and decays."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "lr": 0.02, "betas": (0.8, 0.9)},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def decay(params: dict[str, Tensor]) -> Tensor:
    """An L2 penalty that the loop adds to its loss."""
    return 0.05 * sum(
        (p.square().sum() for p in params.values()), torch.zeros((), dtype=torch.float64)
    )


def halves(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What a loop divides by that accumulates 2 batches, also when the last group has one."""
    return torch.cat(
        [
            torch.full((len(labels),), 1 / (2 * len(labels)), dtype=torch.float64)
            for _, labels in batches
        ]
    )


@dataclass(frozen=True)
class Case:
    """One training."""

    name: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    model: Callable[[], nn.Module] = mlp
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    accumulate: int = 1
    batches: Sequence[Sequence[int]] = field(default_factory=lambda: BATCHES)
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None
    clip: backtrail.ClipNorm | backtrail.ClipValue | None = None
    skipped: Mapping[int, Sequence[int]] = field(
        default_factory=dict
    )  # batches fed before a step and thrown away

    def __str__(self) -> str:
        """The name."""
        return self.name

    def built(self) -> nn.Module:
        """The model at its start, always the same."""
        torch.manual_seed(7)
        return self.model().double()

    def task(self, model: nn.Module, data: TensorDataset) -> backtrail.Task:
        """The training as backtrail is told of it."""
        reduce: Any = halves if self.accumulate > 1 else "mean"
        return backtrail.classification(
            model, data, penalty=self.penalty, clip=self.clip, reduce=reduce
        )

    @property
    def groups(self) -> list[list[Sequence[int]]]:
        """The batches of every step."""
        return [
            list(self.batches[i : i + self.accumulate])
            for i in range(0, len(self.batches), self.accumulate)
        ]


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
CASES = [
    Case("sgd", one_group(SGD, lr=0.3)),
    Case("momentum", one_group(SGD, lr=0.3, momentum=0.9)),
    Case(
        "nesterov with decay",
        one_group(SGD, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.05),
    ),
    Case("dampening", one_group(SGD, lr=0.3, momentum=0.9, dampening=0.4, weight_decay=0.05)),
    Case("maximize", one_group(SGD, lr=0.1, momentum=0.9, maximize=True)),
    Case("adam with decay", one_group(torch.optim.Adam, lr=0.01, weight_decay=0.1)),
    Case("adamw", one_group(ADAMW, lr=0.01)),
    Case("amsgrad", one_group(ADAMW, lr=0.01, amsgrad=True)),
    Case("rmsprop", one_group(torch.optim.RMSprop, lr=0.01)),
    Case("rmsprop centered", one_group(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.5)),
    Case("adagrad", one_group(torch.optim.Adagrad, lr=0.01)),
    Case("adamax", one_group(torch.optim.Adamax, lr=0.01)),
    Case("nadam", one_group(torch.optim.NAdam, lr=0.01)),
    Case("radam", one_group(torch.optim.RAdam, lr=0.01)),
    Case("adadelta", one_group(torch.optim.Adadelta, lr=1.0)),
    Case("asgd", one_group(torch.optim.ASGD, lr=0.1, t0=1)),
    Case("tied, sgd", one_group(SGD, lr=0.3, momentum=0.9), model=Tied),
    Case("tied, adamw", one_group(ADAMW, lr=0.01), model=Tied),
    Case("frozen", one_group(ADAMW, lr=0.01), model=frozen),
    Case("unused", one_group(ADAMW, lr=0.01), model=Partly),
    Case("two groups", two_groups),
    Case(
        "one cycle",
        one_group(SGD, lr=0.1, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.4, total_steps=6
        ),
    ),
    Case(
        "warm-up from zero",
        one_group(ADAMW, lr=0.02, weight_decay=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: step / 4
        ),
    ),
    Case("accumulation, adamw", one_group(ADAMW, lr=0.01), accumulate=2),
    Case("accumulation, batchnorm", one_group(SGD, lr=0.2), accumulate=2, model=normed),
    Case("penalty", one_group(SGD, lr=0.3, momentum=0.9), penalty=decay),
    Case("clip norm", one_group(SGD, lr=0.3, momentum=0.9), clip=backtrail.ClipNorm(0.2)),
    Case("clip norm, adamw", one_group(ADAMW, lr=0.01), clip=backtrail.ClipNorm(0.2)),
    Case("clip value", one_group(SGD, lr=0.3, momentum=0.9), clip=backtrail.ClipValue(0.1)),
    Case("twice in a batch", one_group(ADAMW, lr=0.01), batches=[[0, 0, 1], [2, 3, 2], [0, 4, 4]]),
    Case("short batches", one_group(ADAMW, lr=0.01), batches=[[0, 1, 2], [3], [4, 5]]),
    Case("batchnorm, sgd", one_group(SGD, lr=0.2, momentum=0.9), model=normed),
    Case("batchnorm, adamw", one_group(ADAMW, lr=0.003), model=normed),
    Case(
        "batchnorm, skipped",
        one_group(SGD, lr=0.2),
        model=normed,
        skipped={0: [5, 7, 8], 2: [0, 1, 4, 6]},
    ),
]
CASES_BY_NAME = {case.name: case for case in CASES}


def train(
    case: Case, model: nn.Module, data: TensorDataset, weights: Weights | None = None
) -> Iterator[int]:
    """The loop on its own; yields the number of every state as it is reached."""
    optimizer = case.optimizer(model)
    yield from steps(case, model, optimizer, iter(loader(case, data)), weights)


def record(case: Case, model: nn.Module, data: TensorDataset, path: Path, **options: Any) -> None:
    """The same loop with a recorder beside it."""
    optimizer = case.optimizer(model)
    with backtrail.Recorder(
        path, case.task(model, data), optimizer, checkpoints=backtrail.Every(2), **options
    ) as recorder:
        for _ in steps(case, model, optimizer, iter(recorder.watch(loader(case, data))), None):
            pass


def loader(case: Case, data: TensorDataset) -> "DataLoader[Any]":
    """The case's batches, in order."""
    order = [
        batch
        for step, group in enumerate(case.groups)
        for batch in (case.skipped.get(step), *group)
        if batch
    ]
    return DataLoader(data, batch_sampler=[list(batch) for batch in order])


def steps(
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    weights: Weights | None,
) -> Iterator[int]:
    """Plain PyTorch, as users write it."""
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    for step, group in enumerate(case.groups):
        if step in case.skipped:
            throw_away(model, optimizer, next(batches))
        for place, _ in enumerate(group):
            inputs, labels = next(batches)
            losses = cross_entropy(model(inputs), labels, reduction="none")
            if weights is not None:
                first = sum(len(earlier) for earlier in group[:place])
                losses = losses * weights(step)[first : first + len(losses)]
            loss = losses.sum() / (case.accumulate * len(labels))
            if case.penalty and place == 0:
                loss = loss + case.penalty(dict(model.named_parameters()))
            loss.backward()
        clip(case, model)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        yield step + 1


def throw_away(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]) -> None:
    """As a GradScaler does with a gradient that overflowed: what stays is what the forward pass did."""
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.zero_grad()


def clip(case: Case, model: nn.Module) -> None:
    """As loops clip."""
    if isinstance(case.clip, backtrail.ClipNorm):
        nn.utils.clip_grad_norm_(model.parameters(), case.clip.max_norm)
    if isinstance(case.clip, backtrail.ClipValue):
        nn.utils.clip_grad_value_(model.parameters(), case.clip.max_value)
