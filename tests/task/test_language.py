"""Language models: which tokens count, and how much."""

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

import backtrail
from backtrail.errors import NoLabels, UnexplainedGradient
from tests.loops import adam, backward, refused

LABELS = torch.tensor([[0, 1, 2, 3], [4, 2, -100, -100], [-100, 1, -100, 0], [3, -100, -100, -100]])
# Nothing precedes the first label, so it is never predicted.
COUNTS = torch.tensor([3.0, 1.0, 2.0, 0.0])
VALUES = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(1))


class Words(nn.Module):
    """A tiny language model that wants its inputs by name, and no others."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(3)
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Logits among other things, `[row, place, token]`."""
        hidden = torch.tanh(self.table(input_ids))
        return {"hidden": hidden, "logits": self.head(hidden)}


def rows(**more: Tensor) -> Any:
    """Tokens and labels by name."""
    columns = {"input_ids": LABELS.clamp(min=0), "labels": LABELS} | more
    return [{name: column[row] for name, column in columns.items()} for row in range(len(LABELS))]


def named(items: list[Any]) -> Any:
    """A batch in a mapping that is no dict, as tokenizers give it."""
    return UserDict(default_collate(items))


def token_nats(model: nn.Module, batch: Any) -> Tensor:
    """Loss of every token but the first, zero where the label is -100."""
    logits = model(batch["input_ids"])["logits"]
    return cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")


def test_labels_are_shifted_and_some_do_not_count() -> None:
    """The logits at a place are for the label at the next; a row of nothing has loss zero."""
    model = Words()
    task = backtrail.language_model(model, rows())
    losses, _ = task.losses(task.parameters(), {}, task.batch(range(4)))
    expected = token_nats(model, default_collate(rows())).sum(1) / COUNTS.clamp(min=1)
    torch.testing.assert_close(losses, expected.detach())


def test_tokens_may_have_weights() -> None:
    """A row's loss is the mean by weights; the model never sees them."""
    model, data = Words(), rows(token_weights=VALUES)
    task = backtrail.language_model(model, data)
    losses, _ = task.losses(task.parameters(), {}, task.batch(range(3)))
    counted = (VALUES * (LABELS != -100))[:3, 1:]
    expected = (token_nats(model, task.batch(range(3))) * counted).sum(1) / counted.sum(1)
    torch.testing.assert_close(losses, expected.detach())


def test_a_mean_over_tokens_gives_a_row_its_share_of_them() -> None:
    """Over all batches of a step, or batch by batch; tuples and mappings alike."""
    first, second = default_collate(rows()[:2]), default_collate(rows()[2:])
    over_step, over_batch = (
        backtrail.TokenMean()([first, second]),
        backtrail.TokenMean(over="batch")([first, second]),
    )
    assert over_step.tolist() == pytest.approx([3 / 6, 1 / 6, 2 / 6, 0])
    assert over_batch.tolist() == pytest.approx([3 / 8, 1 / 8, 1 / 2, 0])
    nothing = default_collate(rows()[3:])
    assert backtrail.TokenMean()([nothing]).tolist() == [0]
    assert backtrail.TokenMean(over="batch")([first, nothing]).tolist() == pytest.approx(
        [3 / 8, 1 / 8, 0]
    )
    pair = LABELS, LABELS  # targets of a tuple are not shifted
    assert backtrail.TokenMean()([pair]).tolist() == pytest.approx([4 / 9, 2 / 9, 2 / 9, 1 / 9])
    weighted = default_collate(rows(token_weights=VALUES))
    share = (VALUES * (LABELS != -100))[:, 1:].double().sum(1)
    torch.testing.assert_close(backtrail.TokenMean()([weighted]), share / share.sum())


@pytest.mark.parametrize("over", ["step", "batch"])
@pytest.mark.parametrize("keep", [True, False])
def test_loops_that_average_over_tokens(over: Any, *, keep: bool, tmp_path: Path) -> None:
    """Two accumulated batches, in a mapping that is no dict, checked and replayed."""
    model = Words()
    task = backtrail.language_model(model, rows(), reduce=backtrail.TokenMean(over), collate=named)
    optimizer = adam(model)
    batches = [[0, 1], [2, 3], [3, 0], [1, 2]]
    loader: DataLoader[Any] = DataLoader(rows(), batch_sampler=batches, collate_fn=named)
    totals = [6, 6] if over == "step" else [8, 4, 6, 6]
    with backtrail.Recorder(tmp_path, task, optimizer, keep_batches=keep) as recorder:
        for number, batch in enumerate(recorder.watch(loader)):
            assert isinstance(batch, UserDict)
            backward(
                token_nats(model, batch).sum() / totals[number // 2 if over == "step" else number]
            )
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = backtrail.open_run(tmp_path, task)
    assert run.verify().difference < 1e-6
    queries = backtrail.Loss(rows(), samples=[0, 3])
    assert queries.names == ("loss[0]", "loss[3]")
    total = backtrail.DIT().attribute(run, queries).total()[:, 0]
    assert (total[0, :3] != 0).all()
    assert (total[1] == 0).all()  # it predicts nothing, so nothing moves its loss
    assert total[0, 3] == 0  # and taught nothing


def test_a_mean_over_rows_is_no_mean_over_tokens(tmp_path: Path) -> None:
    """The recorder notices, and names the argument."""
    model = Words()
    task, optimizer = backtrail.language_model(model, rows()), adam(model)
    with (
        refused(UnexplainedGradient, "reduce"),
        backtrail.Recorder(tmp_path, task, optimizer) as recorder,
    ):
        for batch in recorder.watch(DataLoader(rows(), batch_size=2)):
            backward(token_nats(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum())
            optimizer.step()


def test_batches_without_labels_are_refused() -> None:
    """What they have is named, and what to do."""
    task = backtrail.language_model(Words(), [{"input_ids": torch.zeros(4, dtype=torch.long)}] * 2)
    with refused(NoLabels, "needs the key 'labels'", "['input_ids']", "a copy of 'input_ids'"):
        task.losses(task.parameters(), {}, task.batch([0, 1]))


def test_classifiers_and_regressions_take_mappings_too() -> None:
    """Their targets are the labels."""

    class Sums(nn.Module):
        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": inputs + 0 * labels[:, None]}

    inputs, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    data = [{"inputs": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]
    sorting = backtrail.classification(Sums(), data, collate=named)
    losses, _ = sorting.losses({}, {}, sorting.batch(range(4)))
    torch.testing.assert_close(losses, cross_entropy(inputs, labels, reduction="none"))
    wide = [row | {"labels": row["inputs"] + 2} for row in data]
    measuring = backtrail.regression(
        nn.Identity(), wide, predict=lambda _, batch: {"logits": batch["inputs"]}
    )
    torch.testing.assert_close(
        measuring.losses({}, {}, measuring.batch([0, 1]))[0], torch.full((2,), 4.0)
    )
