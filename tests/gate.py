"""The table of the exactness test: a row is a kind of training, a column an optimizer.

The loop in `Cell.steps` is plain PyTorch, two epochs long, so that samples come twice. Brute force
runs it once for every small change of one slot's weight, and calls nothing of backtrail; a recorder
runs it once.
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
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import backtrail
from tests.cases import Weights
from tests.oracles.nudge import all_ones, nudge

# Largest relative difference between influence and brute force.
BAR = 1e-6
# Half widths of the differences, each a quarter of the one before.
SIZES = (2.5e-4, 6.25e-5, 1.5625e-5)
# Six samples, each once an epoch, in batches of different sizes.
COUNT = 6
EPOCHS = [[[0, 1, 2], [3, 4, 5]], [[5, 0], [2, 4, 1, 3]]]
FEATURES = 4
CLASSES = 3
TOKENS = 6
LENGTH = 4
WIDTH = 4
Optimizer = torch.optim.Optimizer
COLUMNS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD + momentum": lambda learning: torch.optim.SGD(learning, lr=0.2, momentum=0.9),
    "AdamW": lambda learning: torch.optim.AdamW(learning, lr=0.01),
}


@dataclass(frozen=True)
class Row:
    """A kind of training.

    Attributes:
        name: What is special about it.
        model: Makes the model before step 0; `Cell.start` turns it to float64.
        data: Makes the training set.
        loss: The loss of a batch as a loop writes it, with the weights of its slots: `loss(model,
            batch, weights)`.
        task: Describes the same loss to backtrail.
        read: Evaluates the queries of a model in eval mode on other samples, `[query]`.
        epochs: The sample numbers of every batch of every epoch.
        keep_batches: Whether the recorder stores the batches.
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
        """The sample numbers of every step's batch."""
        return [batch for epoch in self.epochs for batch in epoch]

    @property
    def counts(self) -> list[int]:
        """The number of slots of every step."""
        return [len(batch) for batch in self.batches]

    @property
    def observed_at(self) -> list[int]:
        """The states at the ends of the epochs."""
        ends = np.cumsum([len(epoch) for epoch in self.epochs])
        return [int(end) for end in ends]


@dataclass(frozen=True)
class Cell:
    """A row and a column of the table."""

    row: Row
    column: str

    def __str__(self) -> str:
        """Return the names of both."""
        return f"{self.row.name} x {self.column}"

    def start(self) -> tuple[nn.Module, Optimizer, Any]:
        """Make model, optimizer and data, always from the same random state."""
        torch.manual_seed(7)
        model = self.row.model().double().train()
        data = self.row.data()
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, COLUMNS[self.column](learning), data

    def steps(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Iterable[Any],
        weights: Weights,
    ) -> Iterator[int]:
        """Run the training loop; yield the number of every state as it is reached."""
        for step, batch in enumerate(batches):
            loss = self.row.loss(model, batch, weights(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1

    def loader(self, data: Any, task: backtrail.Task) -> "DataLoader[Any]":
        """Make the loader of the row's batches in order."""
        return DataLoader(data, batch_sampler=self.row.batches, collate_fn=task.collate)

    def trained(self, weights: Weights) -> np.ndarray:
        """Train, and return the queries at the ends of the epochs, `[query, observed_at]`."""
        model, optimizer, data = self.start()
        loader = self.loader(data, self.row.task(model, data))
        queries = []
        for state in self.steps(model, optimizer, loader, weights):
            if state in self.row.observed_at:
                with torch.no_grad():
                    queries.append(self.row.read(model.eval()).numpy())
                model.train()
        return np.stack(queries, axis=1)

    def recorded(self, folder: Path) -> backtrail.Run:
        """Record the same training."""
        model, optimizer, data = self.start()
        task = self.row.task(model, data)
        recorder = backtrail.Recorder(
            folder,
            task,
            optimizer,
            checkpoints=backtrail.Every(3),
            keep_batches=self.row.keep_batches,
        )
        with recorder:
            batches = recorder.watch(self.loader(data, task))
            for _ in self.steps(model, optimizer, batches, all_ones(self.row.counts)):
                pass
        return backtrail.open_run(folder, task)

    def error(self, folder: Path, *, accelerated: tuple[bool, ...] = (True,)) -> float:
        """Return how far influence is from brute force.

        That is the largest difference of an entry relative to the largest entry of its query and
        observed state, with acceleration on, off, or each of both.
        """
        run = self.recorded(folder)
        run.verify()
        truth = nudge(self.trained, self.row.counts, SIZES)
        labels = [f"query {number}" for number in range(len(truth))]
        queries = backtrail.Custom(self.row.read, labels=labels)
        scale = np.abs(truth).max(axis=(2, 3))
        assert (scale > 1e-9).all(), "no slot has influence on a query: nothing is tested"
        errors: list[float] = []
        for enabled in accelerated:
            with backtrail.acceleration(enabled):
                found = backtrail.DIT().attribute(run, queries, observed_at=self.row.observed_at)
            difference = np.abs(found.values() - truth).max(axis=(2, 3))
            errors.append(float((difference / scale).max()))
        return max(errors)


def cells(rows: list[Row]) -> list[Cell]:
    """Return the cells of some rows."""
    return [Cell(row, column) for row in rows for column in COLUMNS]


def classifier(
    name: str, model: Callable[[], nn.Module], data: Callable[[], Any] | None = None, **more: Any
) -> Row:
    """Make a row whose loss is the mean cross-entropy of inputs and class numbers."""

    def loss(model: nn.Module, batch: Any, weights: Tensor) -> Tensor:
        inputs, labels = batch
        losses = cross_entropy(model(inputs), labels, reduction="none")
        return (losses * weights).mean()

    def read(model: nn.Module) -> Tensor:
        inputs, labels = points(seed=1).tensors
        losses = cross_entropy(model(inputs), labels, reduction="none")
        return torch.stack([losses[0], losses.mean()])

    return Row(name, model, data or points, loss, backtrail.classification, read, EPOCHS, **more)


@cache
def points(seed: int = 0) -> TensorDataset:
    """Draw inputs `[row, feature]` and class numbers `[row]`."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(COUNT, FEATURES, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (COUNT,), generator=draw)
    return TensorDataset(inputs, labels)


def mlp(*between: nn.Module, bias: bool = True) -> nn.Sequential:
    """Make a smooth network of two linear layers with other modules between them."""
    first = nn.Linear(FEATURES, 5, bias=bias)
    return nn.Sequential(first, *between, nn.GELU(), nn.Linear(5, CLASSES))


def normed() -> nn.Module:
    """Make the same network with BatchNorm."""
    # BatchNorm subtracts the mean: the gradient of a bias before it would be rounding alone.
    return mlp(nn.BatchNorm1d(5), bias=False)


def frozen() -> nn.Module:
    """Make the same network with a first layer that does not learn."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


def adapted() -> nn.Module:
    """Make the same network with low-rank adapters on both layers; nothing else learns."""
    peft = pytest.importorskip("peft", reason="pip install 'backtrail[hf]'")
    model: nn.Module = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    return model


class Noisy(Dataset[Any]):
    """Rows to which new noise is added every time they are read."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(points())

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one row with new noise."""
        inputs, label = points()[index]
        noise = torch.randn(FEATURES, dtype=torch.float64)
        return inputs + 0.3 * noise, label


class TinyGPT(nn.Module):
    """A language model of one causal attention head, which attends to no padding.

    With `tied`, the weight of its head is that of its embedding.
    """

    def __init__(self, *, tied: bool) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map tokens `[row, place]` to logits of the next token `[row, place, token]`."""
        x = self.table(input_ids) + self.places
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, :]
        attended = scaled_dot_product_attention(x, x, x, attn_mask=mask)
        logits: Tensor = self.head(torch.tanh(self.mix(attended)))
        return logits


def sentences(seed: int = 0) -> TensorDataset:
    """Draw tokens `[row, place]` and the tokens that follow them.

    The last token of the vocabulary never occurs: its row of the embedding gets no gradient as an
    input, only as a part of the head.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS - 1, (COUNT, LENGTH + 1), generator=draw)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def tied_embeddings() -> Row:
    """Make the row of a language model whose head has the weight of its embedding."""

    def row_losses(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        losses = cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none")
        return losses.mean(1)

    def loss(model: nn.Module, batch: Any, weights: Tensor) -> Tensor:
        tokens, targets = batch
        return (row_losses(model, tokens, targets) * weights).mean()

    def read(model: nn.Module) -> Tensor:
        tokens, targets = sentences(seed=1).tensors
        losses = row_losses(model, tokens, targets)
        return torch.stack([losses[0], losses.mean()])

    return Row(
        "tied embeddings",
        lambda: TinyGPT(tied=True),
        sentences,
        loss,
        backtrail.language_model,
        read,
        EPOCHS,
    )


def padded(seed: int = 0) -> list[dict[str, Tensor]]:
    """Draw rows of different lengths as Hugging Face's models take them, with token weights.

    The last token of the vocabulary never occurs: its row of the embedding never gets a gradient,
    and Adam divides zero by zero there.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS - 1, (COUNT, LENGTH), generator=draw)
    lengths = torch.tensor([4, 2, 3, 4, 1, 3])  # row 4 has nothing to predict
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    weights = torch.rand(COUNT, LENGTH, generator=draw, dtype=torch.float64)
    rows = []
    for row in range(COUNT):
        rows.append(
            {
                "input_ids": ids[row],
                "attention_mask": mask[row],
                "labels": labels[row],
                "token_weights": weights[row],
            }
        )
    return rows


def padding_masks() -> Row:
    """Make the row of padded batches with a weighted mean over all tokens of a batch."""

    def token_losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])[:, :-1]
        targets = batch["labels"][:, 1:]
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return losses * batch["token_weights"][:, 1:]

    def loss(model: nn.Module, batch: Any, weights: Tensor) -> Tensor:
        is_target = batch["labels"][:, 1:] != -100
        denominator = (batch["token_weights"][:, 1:] * is_target).sum()
        return (token_losses(model, batch) * weights[:, None]).sum() / denominator

    def read(model: nn.Module) -> Tensor:
        losses = token_losses(model, default_collate(padded(seed=1)))
        return torch.stack([losses[0].mean(), losses.mean()])

    def task(model: nn.Module, data: Any) -> backtrail.Task:
        return backtrail.language_model(model, data, reduce=backtrail.TokenMean())

    return Row("padding masks", lambda: TinyGPT(tied=False), padded, loss, task, read, EPOCHS)


def pairs(seed: int = 0) -> TensorDataset:
    """Draw two views `[row, feature]` of every row."""
    draw = torch.Generator().manual_seed(seed)
    views = torch.randn(2, COUNT, FEATURES, generator=draw, dtype=torch.float64)
    return TensorDataset(*views)


def info_nce(left: Tensor, right: Tensor) -> Tensor:
    """Return the InfoNCE loss of every row `[row]`, at temperature 0.5.

    A row is classified as its own other view among the other views of its batch.
    """
    similarity = normalize(left, dim=1) @ normalize(right, dim=1).T
    return cross_entropy(similarity / 0.5, torch.arange(len(left)), reduction="none")


def contrastive() -> Row:
    """Make the row of a loss in which every row depends on the others of its batch."""

    def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        left, right = batch
        return model(left), model(right)

    def loss(model: nn.Module, batch: Any, weights: Tensor) -> Tensor:
        left, right = predict(model, batch)
        return (info_nce(left, right) * weights).mean()

    def read(model: nn.Module) -> Tensor:
        left, right = predict(model, pairs(seed=1).tensors)
        losses = info_nce(left, right)
        return torch.stack([losses[0], losses.mean()])

    def task(model: nn.Module, data: Any) -> backtrail.Task:
        return backtrail.Task(model, data, lambda views, _: info_nce(*views), predict=predict)

    return Row("contrastive", mlp, pairs, loss, task, read, EPOCHS)


ROWS = [
    tied_embeddings(),
    classifier("BatchNorm, eval-mode queries", normed),
    classifier("dropout", lambda: mlp(nn.Dropout(0.3))),
    classifier("stored augmentation", mlp, Noisy, keep_batches=True),
    classifier("frozen parameters", frozen),
    classifier("LoRA (PEFT)", adapted),
    padding_masks(),
    contrastive(),
]
