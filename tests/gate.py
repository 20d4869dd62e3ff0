"""The exactness gate: each row is something that training code really does, each column an optimizer.

The loop below is plain PyTorch, two epochs long, so that samples come back. The brute force runs it
again and again with the weight of one slot nudged, and never touches a line of backtrail; the
recorder runs it once.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset, TensorDataset

import backtrail
from tests.oracles.nudge import Weights, nudge

BAR = 1e-6
SIZES = (
    2.5e-4,
    6.25e-5,
    1.5625e-5,
)  # of the nudges; for each entry the pair that agrees best tells the truth
COUNT, EPOCHS = 6, [[[0, 1, 2], [3, 4, 5]], [[5, 0], [2, 4, 1, 3]]]
FEATURES, CLASSES, TOKENS, LENGTH, WIDTH = 4, 3, 6, 4, 4
COLUMNS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD + momentum": lambda learning: torch.optim.SGD(learning, lr=0.2, momentum=0.9),
    "AdamW": lambda learning: torch.optim.AdamW(learning, lr=0.01),
}


_TRUTH: dict[str, np.ndarray] = {}  # by cell


@dataclass(frozen=True)
class Row:
    """Something to train.

    Attributes:
        name: what is peculiar about it.
        model: the model at its start, in float64.
        data: the training set.
        loss: the loss of a batch as a loop writes it, with a weight on every slot: `loss(model,
            batch, weights)`.
        task: the same as backtrail is told of it.
        read: the queries of a model in eval mode, on other rows, `[query]`.
        epochs: rows of the batches.
        keep_batches: whether the recorder stores what it was fed.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[[nn.Module, Any, Tensor], Tensor]
    task: Callable[[nn.Module, Any], backtrail.Task]
    read: Callable[[nn.Module], Tensor]
    epochs: list[list[list[int]]]
    keep_batches: bool = False

    @property
    def batches(self) -> list[list[int]]:
        """One after the other."""
        return [batch for epoch in self.epochs for batch in epoch]

    @property
    def observed_at(self) -> list[int]:
        """The ends of the epochs."""
        return [int(end) for end in np.cumsum([len(epoch) for epoch in self.epochs])]


@dataclass(frozen=True)
class Cell:
    """A row and a column of the gate."""

    row: Row
    column: str

    def __str__(self) -> str:
        """The names of both."""
        return f"{self.row.name} x {self.column}"

    def begun(self) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        """Model, optimizer and data at their start, and the generator where the loop will draw from."""
        torch.manual_seed(7)
        model, data = self.row.model().double().train(), self.row.data()
        return model, COLUMNS[self.column]([p for p in model.parameters() if p.requires_grad]), data

    def steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Any],
        weights: Weights,
    ) -> Iterator[int]:
        """The loop; yields the number of every state as it is reached."""
        for step, batch in enumerate(batches):
            self.row.loss(model, batch, weights(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1

    def loader(self, data: Any, task: backtrail.Task) -> "DataLoader[Any]":
        """The row's batches, in order."""
        return DataLoader(data, batch_sampler=self.row.batches, collate_fn=task.collate)

    def trained(self, weights: Weights) -> np.ndarray:
        """Brute force: train, and read the queries at the ends of the epochs, [query, observed_at]."""
        model, optimizer, data = self.begun()
        found = []
        for state in self.steps(
            model, optimizer, self.loader(data, self.row.task(model, data)), weights
        ):
            if state in self.row.observed_at:
                with torch.no_grad():
                    found.append(self.row.read(model.eval()).numpy())
                model.train()
        return np.stack(found, axis=1)

    def recorded(self, folder: Path) -> backtrail.Run:
        """The same training with a recorder beside it."""
        model, optimizer, data = self.begun()
        task = self.row.task(model, data)
        with backtrail.Recorder(
            folder,
            task,
            optimizer,
            checkpoints=backtrail.Every(3),
            keep_batches=self.row.keep_batches,
        ) as recorder:
            for _ in self.steps(
                model, optimizer, recorder.watch(self.loader(data, task)), self.as_it_was
            ):
                pass
        return backtrail.open_run(folder, task)

    def truth(self) -> np.ndarray:
        """The derivatives by brute force; they take most of the time, so a process takes them once."""
        if str(self) not in _TRUTH:
            sizes = [len(batch) for batch in self.row.batches]
            _TRUTH[str(self)] = nudge(self.trained, sizes, SIZES)
        return _TRUTH[str(self)]

    def as_it_was(self, step: int) -> Tensor:
        """Every slot weighs 1."""
        return torch.ones(len(self.row.batches[step]), dtype=torch.float64)

    def error(self, folder: Path) -> float:
        """Largest difference between influence and brute force, relative to the largest, by query and state."""
        run = self.recorded(folder)
        run.verify()
        truth = self.truth()
        queries = backtrail.Custom(
            self.row.read, labels=[f"query {row}" for row in range(len(truth))]
        )
        found = backtrail.DIT().attribute(run, queries, observed_at=self.row.observed_at).values()
        scale = np.abs(truth).max(axis=(2, 3))
        assert (scale > 1e-9).all(), "a query that nothing moves proves nothing"
        return float((np.abs(found - truth).max(axis=(2, 3)) / scale).max())


def cells(rows: list[Row]) -> list[Cell]:
    """All columns of these rows."""
    return [Cell(row, column) for row in rows for column in COLUMNS]


def classifier(
    name: str, model: Callable[[], nn.Module], data: Callable[[], Any] | None = None, **more: Any
) -> Row:
    """A row with inputs, class numbers and a mean of cross-entropies."""

    def loss(model: nn.Module, batch: Any, weights: Tensor) -> Tensor:
        return (cross_entropy(model(batch[0]), batch[1], reduction="none") * weights).mean()

    def read(model: nn.Module) -> Tensor:
        inputs, labels = points(seed=1).tensors
        losses = cross_entropy(model(inputs), labels, reduction="none")
        return torch.stack([losses[0], losses.mean()])

    return Row(name, model, data or points, loss, backtrail.classification, read, EPOCHS, **more)


@cache
def points(seed: int = 0) -> TensorDataset:
    """Random inputs and class numbers."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(COUNT, FEATURES, generator=draw, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(CLASSES, (COUNT,), generator=draw))


def mlp(*between: nn.Module, bias: bool = True) -> nn.Sequential:
    """Two smooth layers with something between."""
    return nn.Sequential(
        nn.Linear(FEATURES, 5, bias=bias), *between, nn.GELU(), nn.Linear(5, CLASSES)
    )


def normed() -> nn.Module:
    """BatchNorm (no bias before it: its gradient would be nothing but rounding)."""
    return mlp(nn.BatchNorm1d(5), bias=False)


def frozen() -> nn.Module:
    """The first layer does not learn."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


def adapted() -> nn.Module:
    """Low-rank adapters on both layers; nothing else learns."""
    peft = pytest.importorskip("peft", reason="pip install 'backtrail[hf]'")
    model: nn.Module = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    return model


class Noisy(Dataset[Any]):
    """Rows that come out differently every time they are read."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(points())

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One row with new noise."""
        inputs, label = points()[index]
        return inputs + 0.3 * torch.randn(FEATURES, dtype=torch.float64), label


class TinyGPT(nn.Module):
    """One head of causal attention over what is no padding; the head is the embedding, transposed, if tied."""

    def __init__(self, *, tied: bool) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores of the next token, `[row, place, token]`."""
        x = self.table(input_ids) + self.places
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, :]
        found: Tensor = self.head(
            torch.tanh(self.mix(scaled_dot_product_attention(x, x, x, attn_mask=seen)))
        )
        return found


def sentences(seed: int = 0) -> TensorDataset:
    """Tokens and next tokens. The last token never occurs as an input: nothing but the head moves its row."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS - 1, (COUNT, LENGTH + 1), generator=draw)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def tied() -> Row:
    """A language model whose embedding is also its head."""

    def each_row(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none").mean(1)

    def read(model: nn.Module) -> Tensor:
        losses = each_row(model, *sentences(seed=1).tensors)
        return torch.stack([losses[0], losses.mean()])

    return Row(
        "tied embeddings",
        lambda: TinyGPT(tied=True),
        sentences,
        lambda model, batch, weights: (each_row(model, *batch) * weights).mean(),
        backtrail.language_model,
        read,
        EPOCHS,
    )


def padded(seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of different lengths as Hugging Face's models take them, with a weight for every token.

    The last token never occurs: its row of the table never moves, and Adam divides zero by zero
    there.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS - 1, (COUNT, LENGTH), generator=draw)
    mask = (
        torch.arange(LENGTH) < torch.tensor([4, 2, 3, 4, 1, 3])[:, None]
    ).long()  # row 4 predicts nothing
    labels, weights = (
        ids.masked_fill(mask == 0, -100),
        torch.rand(COUNT, LENGTH, generator=draw, dtype=torch.float64),
    )
    names = ("input_ids", "attention_mask", "labels", "token_weights")
    return [
        dict(zip(names, row, strict=True)) for row in zip(ids, mask, labels, weights, strict=True)
    ]


def masked() -> Row:
    """Padding masks, and a mean over all tokens of a batch by their weights."""

    def nats(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])[:, :-1]
        found = cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100
        )
        return found * batch["token_weights"][:, 1:]

    def loss(model: nn.Module, batch: Any, weights: Tensor) -> Tensor:
        counted = batch["token_weights"][:, 1:] * (batch["labels"][:, 1:] != -100)
        return (nats(model, batch) * weights[:, None]).sum() / counted.sum()

    def read(model: nn.Module) -> Tensor:
        losses = nats(model, torch.utils.data.default_collate(padded(seed=1)))
        return torch.stack([losses[0].mean(), losses.mean()])

    def task(model: nn.Module, data: Any) -> backtrail.Task:
        return backtrail.language_model(model, data, reduce=backtrail.TokenMean())

    return Row("padding masks", lambda: TinyGPT(tied=False), padded, loss, task, read, EPOCHS)


def pairs(seed: int = 0) -> TensorDataset:
    """Two views of every row."""
    views = torch.randn(
        2, COUNT, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return TensorDataset(*views)


def contrasted(left: Tensor, right: Tensor) -> Tensor:
    """InfoNCE: every row has to find its own other view among those of its batch."""
    likeness = normalize(left, dim=1) @ normalize(right, dim=1).T / 0.5
    return cross_entropy(likeness, torch.arange(len(left)), reduction="none")


def contrastive() -> Row:
    """A loss in which the rows of a batch need one another."""

    def views(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0]), model(batch[1])

    def read(model: nn.Module) -> Tensor:
        losses = contrasted(*views(model, pairs(seed=1).tensors))
        return torch.stack([losses[0], losses.mean()])

    return Row(
        "contrastive",
        mlp,
        pairs,
        lambda model, batch, weights: (contrasted(*views(model, batch)) * weights).mean(),
        lambda model, data: backtrail.Task(
            model, data, lambda outputs, _: contrasted(*outputs), predict=views
        ),
        read,
        EPOCHS,
    )


ROWS = [
    tied(),
    classifier("BatchNorm, eval-mode queries", normed),
    classifier("dropout", lambda: mlp(nn.Dropout(0.3))),
    classifier("stored augmentation", mlp, Noisy, keep_batches=True),
    classifier("frozen parameters", frozen),
    classifier("LoRA (PEFT)", adapted),
    masked(),
    contrastive(),
]
