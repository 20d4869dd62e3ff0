"""Gradients of many rows at once: the same as of every row on its own."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

import backtrail
from backtrail.queries import Query, Saliency, gradients
from backtrail.queries.rows import RowQuery
from backtrail.queries.subset import QuerySubset
from backtrail.task.task import Task
from tests.cases import Tied, normed, rows

DATA = rows(seed=3, count=7)
TEXTS = [
    {"input_ids": torch.arange(size) % 5, "labels": torch.arange(size) * 3 % 5}
    for size in (4, 6, 4, 6, 6, 3)
]


class Places(nn.Module):
    """Tokens by name, BatchNorm over their features, and a head whose matrix is the table's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table, self.norm, self.head = (
            nn.Embedding(5, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 5, bias=False),
        )
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[row, place, token]`."""
        hidden = torch.tanh(self.table(input_ids)).cumsum(1)
        found: Tensor = self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))
        return found


def coupled(outputs: Tensor, batch: Any) -> Tensor:
    """A loss that leans on the other rows of a batch."""
    return (outputs - 0.3 * outputs.sum(0)).logsumexp(1) * len(batch[1])


def branching(model: nn.Module, batch: Any) -> Tensor:
    """A branch on the data, which cannot be taken for many rows at once."""
    outputs: Tensor = model(batch[0])
    return outputs * 2.0 if float(outputs.detach().sum()) > 0 else outputs


def noted(items: list[Any]) -> Any:
    """A batch with an entry that is no tensor, the same in all rows or not."""
    inputs, labels = default_collate(items)
    return inputs, labels, None, "long" if float(inputs.sum()) > 0 else None


def labelled(model: Callable[[], nn.Module] = normed, **options: Any) -> Task:
    """Classes of `DATA`."""
    return replace(backtrail.classification(model().double(), DATA), **options)


def language() -> Task:
    """Next tokens of `TEXTS`."""
    return backtrail.language_model(Places().double(), TEXTS)


def apart(query: RowQuery) -> list[Query]:
    """A query of every row on its own."""
    alone: list[Query] = []
    for row in query.selection.rows:
        one = copy(query)
        one.selection = replace(query.selection, rows=(row,))
        alone.append(one)
    return alone


@dataclass
class Counted:
    """Counts the forward passes."""

    predict: Callable[[nn.Module, Any], Any]
    passes: int = 0

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """One more."""
        self.passes += 1
        return self.predict(model, batch)


def taken(query: Query, task: Task) -> tuple[list[Tensor], int]:
    """Values, gradients by parameters and (shifted) running statistics, and forward passes."""
    task = replace(task, predict=Counted(task.predict))
    params, trained = task.parameters(), list(task.parameters())
    buffers = {n: b + 0.3 if b.is_floating_point() else b for n, b in task.buffers().items()}
    # The query looks at a few rows once; what is counted are the readings after that.
    query.prepare(task, params=params, buffers=buffers)
    assert isinstance(task.predict, Counted)
    task.predict.passes = 0
    value, *trees = gradients(query, task, params=params, buffers=buffers, trained=trained)
    return [value, *(tensor for tree in trees for tensor in tree.values())], task.predict.passes


SLOPES = Saliency(DATA, inputs=[2, 0])
ROWWISE: dict[str, tuple[Callable[[], Task], Any, int]] = {
    "loss": (labelled, backtrail.Loss(DATA), 1),
    "logit": (labelled, backtrail.Logit(DATA), 1),
    "margin": (partial(labelled, Tied), backtrail.Margin(DATA), 1),
    "feature": (labelled, backtrail.Feature(DATA, layer="1", unit=2), 1),
    "saliency": (partial(labelled, Tied), SLOPES, 1),
    "at most three": (labelled, backtrail.Loss(DATA, batch=3), 3),
    "sequences of three lengths": (language, backtrail.Loss(TEXTS), 3),
    "entries of other kinds": (partial(labelled, collate=noted), backtrail.Loss(DATA), 2),
    "branches": (partial(labelled, predict=branching), backtrail.Loss(DATA), 8),
}


def check(query: Query, alone: Sequence[Query], task: Task, passes: int) -> None:
    """One after the other gives the same."""
    found, count = taken(query, task)
    truth = [
        torch.cat(parts) for parts in zip(*[taken(one, task)[0] for one in alone], strict=True)
    ]
    for left, right in zip(found, truth, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)
    assert count == passes


@pytest.mark.parametrize("name", ROWWISE)
def test_rows_at_once_are_rows_on_their_own(name: str) -> None:
    """The model runs once for all rows of one form, and no row feels another."""
    task, query, passes = ROWWISE[name]
    check(query, apart(query), task(), passes)


def test_some_queries_of_rows_are_taken_at_once_too() -> None:
    """Each with its own weights."""
    some = (0, 3, 5, 8)
    check(QuerySubset(SLOPES, some), [QuerySubset(SLOPES, (row,)) for row in some], labelled(), 1)


def test_an_average_is_the_mean_of_its_rows() -> None:
    """In blocks, which are not put together."""
    task = labelled()
    found, passes = taken(backtrail.Loss(DATA, aggregate="mean", batch=2), task)
    for mean, each in zip(found, taken(backtrail.Loss(DATA), task)[0], strict=True):
        torch.testing.assert_close(mean[0], each.mean(0), rtol=1e-10, atol=1e-13)
    assert passes == 4


def test_rows_that_share_batch_statistics_stay_together() -> None:
    """In train mode a block is a batch: its gradients are those of plain autograd."""
    model = normed().double().train()
    task = backtrail.classification(model, DATA)
    found, passes = taken(backtrail.Loss(DATA, mode="train"), task)
    losses = cross_entropy(model(DATA.tensors[0]), DATA.tensors[1], reduction="none")
    for row, loss in enumerate(losses):
        slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for left, right in zip(found[1:], slopes, strict=False):
            torch.testing.assert_close(left[row], right, rtol=1e-10, atol=1e-13)
    assert passes == 1


def test_gradients_at_once_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time where no more fit; one by one where two are too few to gain by it."""
    task = labelled()
    entries = sum(tensor.numel() for tensor in task.parameters().values()) + 10
    monkeypatch.setattr("backtrail.queries.query.BLOCK_BYTES", 2 * 8 * entries)
    check(backtrail.Loss(DATA), apart(backtrail.Loss(DATA)), task, 7)
    monkeypatch.setattr("backtrail.queries.query.FEWEST_AT_ONCE", 2)
    check(backtrail.Loss(DATA), apart(backtrail.Loss(DATA)), task, 4)


def test_a_model_that_takes_rows_one_by_one_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not at every state of a training."""
    task = labelled(predict=branching)
    for _ in range(3):
        gradients(
            backtrail.Loss(DATA),
            task,
            params=task.parameters(),
            buffers=task.buffers(),
            trained=list(task.parameters()),
        )
    assert caplog.text.count("one by one") == 1
