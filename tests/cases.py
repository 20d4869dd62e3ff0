"""Small trainings in float64, each with one property that a derivative has to get right.

The loop in `steps` is plain PyTorch. The recorder and the oracles share it: an oracle runs it again
with other weights of the samples, and calls nothing of backtrail.
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

FEATURES = 4
CLASSES = 3
ROWS = 9
# Five steps: some rows come twice, and row 0 three steps after its first visit.
BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 3, 6], [2, 4, 8]]
SGD = torch.optim.SGD
ADAMW = torch.optim.AdamW

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Weights = Callable[[int], Tensor]  # from a step to the weights of its slots, [slot]


def rows(seed: int = 0, count: int = ROWS) -> TensorDataset:
    """Draw inputs `[row, feature]`, whose last feature is always zero, and labels `[row]`."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=draw, dtype=torch.float64)
    # The weights of a feature that is always zero get no gradient: Adam divides zero by zero there.
    inputs[:, -1] = 0.0
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    return TensorDataset(inputs, labels)


class Tied(nn.Module):
    """Three layers of which the first and the last have the same weight."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.first = nn.Linear(FEATURES, CLASSES, bias=False)
        self.middle = nn.Linear(CLASSES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.head.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[row, feature]` to logits `[row, class]`."""
        hidden = torch.tanh(self.first(inputs))
        features = torch.tanh(self.middle(hidden))
        logits: Tensor = self.head(features)
        return logits


class PartlyUsed(nn.Module):
    """A network with a layer that no forward pass uses."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = mlp()
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[row, feature]` to logits `[row, class]`."""
        logits: Tensor = self.body(inputs)
        return logits


def mlp() -> nn.Module:
    """Make a network of two linear layers that is smooth."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.GELU(), nn.Linear(5, CLASSES))


def normed() -> nn.Module:
    """Make the same network with BatchNorm between its layers."""
    # BatchNorm subtracts the mean: the gradient of a bias before it would be rounding alone.
    return nn.Sequential(
        nn.Linear(FEATURES, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.GELU(),
        nn.Linear(5, CLASSES),
    )


def with_dropout() -> nn.Module:
    """Make the same network with dropout between its layers, whose masks a replay draws again."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.GELU(), nn.Dropout(0.4), nn.Linear(5, CLASSES))


def frozen() -> nn.Module:
    """Make the same network with a first layer that does not learn."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


def one_group(kind: type[torch.optim.Optimizer], **settings: Any) -> MakeOptimizer:
    """Return what makes an optimizer with all parameters in one group."""
    return lambda model: kind(model.parameters(), **settings)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Make an AdamW whose rate, betas and decay differ between weights and biases."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "lr": 0.02, "betas": (0.8, 0.9)},
    ]
    return ADAMW(groups, lr=0.01)


def decay(params: dict[str, Tensor]) -> Tensor:
    """Return the L2 penalty that the loop adds to its loss, 0.05 * sum of squares."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter in params.values():
        total = total + parameter.square().sum()
    return 0.05 * total


def halves(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the factor c of every slot's loss `[slot]` in a loop that accumulates two batches.

    It is 1 / (2 * batch size), also in a last step that has only one batch.
    """
    factors = []
    for _, labels in batches:
        size = len(labels)
        factors.append(torch.full((size,), 1 / (2 * size), dtype=torch.float64))
    return torch.cat(factors)


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: What is special about it.
        optimizer: Makes the optimizer of a model.
        model: Makes the model; `built` seeds it and turns it to float64.
        scheduler: Makes the learning-rate scheduler, if there is one.
        accumulate: How many batches one step accumulates.
        batches: The rows of every batch.
        penalty: What the loop adds to its loss, as a function of the parameters.
        clip: How the loop clips its gradients.
        skipped: Rows of a batch that the loop reads before a step, and makes no step with.
    """

    name: str
    optimizer: MakeOptimizer
    model: Callable[[], nn.Module] = mlp
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    accumulate: int = 1
    batches: Sequence[Sequence[int]] = field(default_factory=lambda: BATCHES)
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None
    clip: backtrail.ClipNorm | backtrail.ClipValue | None = None
    skipped: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def built(self) -> nn.Module:
        """Make the model before step 0, always from the same weights."""
        torch.manual_seed(7)
        return self.model().double()

    def task(self, model: nn.Module, data: TensorDataset) -> backtrail.Task:
        """Describe the training to backtrail."""
        reduce: Any = halves if self.accumulate > 1 else "mean"
        return backtrail.classification(
            model, data, penalty=self.penalty, clip=self.clip, reduce=reduce
        )

    @property
    def groups(self) -> list[list[Sequence[int]]]:
        """The batches of every step."""
        starts = range(0, len(self.batches), self.accumulate)
        return [list(self.batches[start : start + self.accumulate]) for start in starts]


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
    Case("unused", one_group(ADAMW, lr=0.01), model=PartlyUsed),
    Case("two groups", two_groups),
    Case(
        "one cycle",
        one_group(SGD, lr=0.1, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.4, total_steps=6
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
    """Run the loop without a recorder; yield the number of every state as it is reached."""
    optimizer = case.optimizer(model)
    batches = iter(loader(case, data))
    yield from steps(case, model, optimizer, batches, weights)


def record(case: Case, model: nn.Module, data: TensorDataset, path: Path, **options: Any) -> None:
    """Run the same loop with a recorder that keeps a checkpoint every two steps."""
    optimizer = case.optimizer(model)
    task = case.task(model, data)
    checkpoints = backtrail.Every(2)
    with backtrail.Recorder(path, task, optimizer, checkpoints=checkpoints, **options) as recorder:
        batches = iter(recorder.watch(loader(case, data)))
        for _ in steps(case, model, optimizer, batches, None):
            pass


def loader(case: Case, data: TensorDataset) -> "DataLoader[Any]":
    """Make the loader of the case's batches in order, those that are skipped among them."""
    order: list[list[int]] = []
    for step, group in enumerate(case.groups):
        if step in case.skipped:
            order.append(list(case.skipped[step]))
        order.extend(list(batch) for batch in group)
    return DataLoader(data, batch_sampler=order)


def steps(
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    weights: Weights | None,
) -> Iterator[int]:
    """Run the training loop in plain PyTorch; yield the number of every state as it is reached.

    L_t = sum over slots b of c_{t,b} * w_{t,b} * loss_b, plus the penalty; without `weights` every
    w is 1, and c_{t,b} is 1 / (accumulated batches * size of the slot's batch).
    """
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    for step, group in enumerate(case.groups):
        if step in case.skipped:
            skip_batch(model, optimizer, next(batches))
        first_slot = 0
        for position in range(len(group)):
            inputs, labels = next(batches)
            losses = cross_entropy(model(inputs), labels, reduction="none")
            last_slot = first_slot + len(losses)
            if weights is not None:
                losses = losses * weights(step)[first_slot:last_slot]
            first_slot = last_slot
            loss = losses.sum() / (case.accumulate * len(labels))
            # The penalty counts once a step, however many batches are accumulated.
            if case.penalty and position == 0:
                loss = loss + case.penalty(dict(model.named_parameters()))
            loss.backward()
        clip(case, model)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        yield step + 1


def skip_batch(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]) -> None:
    """Drop the gradient of a batch, as a GradScaler does after an overflow.

    What the forward pass did to BatchNorm's statistics stays.
    """
    inputs, labels = batch
    cross_entropy(model(inputs), labels).backward()
    optimizer.zero_grad()


def clip(case: Case, model: nn.Module) -> None:
    """Clip the gradients as training loops do, if the case says so."""
    if isinstance(case.clip, backtrail.ClipNorm):
        nn.utils.clip_grad_norm_(model.parameters(), case.clip.max_norm)
    if isinstance(case.clip, backtrail.ClipValue):
        nn.utils.clip_grad_value_(model.parameters(), case.clip.max_value)
