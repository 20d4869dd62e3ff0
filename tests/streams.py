"""A training on a stream, whose batches carry the ids of their samples."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

import backtrail
from backtrail.run.run import Run
from tests.loops import backward, mlp, rows

# In no order and without a pattern; some do not fit into 32 bits.
SAMPLE_IDS = [7, 3, 900_000_000_000_000_007, 41, 12, 5, 100, 101, 2**62, 8, 9, 10]
STREAM_ROWS = rows(len(SAMPLE_IDS))


class KeywordModel(nn.Module):
    """A model that a Task without `predict` calls by the batch's keys; it has no use for ids."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = mlp().double()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map inputs `[row, feature]` to logits `[row, class]`."""
        del labels
        logits: Tensor = self.body(inputs)
        return logits


class Stream(IterableDataset[dict[str, Any]]):
    """All rows with their ids, in a new random order in every pass."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Make one pass."""
        for row in torch.randperm(len(SAMPLE_IDS)).tolist():
            inputs, label = STREAM_ROWS[row]
            yield {"inputs": inputs.double(), "labels": label, "id": SAMPLE_IDS[row]}


def row_losses(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of every row, `[row]`."""
    return cross_entropy(outputs, batch["labels"], reduction="none")


def recorded_stream(
    path: Path,
    ids: Any = "id",
    *,
    change: Callable[[Any], Any] = lambda batch: batch,
    epochs: int = 3,
) -> Run:
    """Record SGD on the stream, with three steps an epoch.

    Args:
        path: The run's folder.
        ids: Where the task finds the ids in a batch.
        change: What is made of a batch before the recorder sees it.
        epochs: Number of passes.
    """
    model = KeywordModel()
    batches = DataLoader(Stream(), batch_size=4)
    task = backtrail.Task(model, None, row_losses, ids=ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(path, task, optimizer, checkpoints=backtrail.Every(4)) as recorder:
        for _ in range(epochs):
            for batch in recorder.watch(map(change, batches)):
                backward(row_losses(model(batch["inputs"]), batch).mean())
                optimizer.step()
                optimizer.zero_grad()
    # The recorder's hooks are gone, but another model shows that the run does not need the first.
    return backtrail.open_run(path, backtrail.Task(KeywordModel(), None, row_losses, ids=ids))
