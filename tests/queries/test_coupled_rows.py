"""Losses that couple the rows of a batch are read in groups, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import CoupledRows
from backtrail.queries import gradients, values
from backtrail.run.run import Run

ROWS = 12
GROUP = 4


def data() -> TensorDataset:
    """Two views of each row."""
    made = torch.Generator().manual_seed(1)
    first = torch.randn(ROWS, 5, dtype=torch.float64, generator=made)
    second = first + 0.3 * torch.randn(ROWS, 5, dtype=torch.float64, generator=made)
    return TensorDataset(first, second)


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Both views."""
    return model(batch[0]), model(batch[1])


def contrastive(outputs: Any, batch: Any) -> Tensor:
    """InfoNCE with the other rows as negatives."""
    del batch
    logits = outputs[0] @ outputs[1].T
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")


def relative(outputs: Any, batch: Any) -> Tensor:
    """Distance of the views, divided by its mean over the batch."""
    del batch
    distance = (outputs[0] - outputs[1]).square().sum(1)
    return distance / distance.mean()


LOSSES = {"contrastive": contrastive, "relative": relative}


def recorded(loss: Any, folder: Path) -> Run:
    """Train on groups of four."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.Task(model, data(), loss=loss, predict=predict)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for batch in recorder.watch(DataLoader(data(), GROUP)):
            loss(predict(model, batch), batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return backtrail.open_run(folder, task)


def losses_in_groups(run: Run, model: nn.Module, size: int) -> Tensor:
    """The losses of the rows in groups of so many, by plain torch."""
    groups = [data()[first : first + size] for first in range(0, ROWS, size)]
    return torch.cat([run.task.loss(predict(model, group), group) for group in groups])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [GROUP, ROWS])
def test_rows_are_read_in_the_groups_that_are_given(name: str, size: int, tmp_path: Path) -> None:
    """Values and gradients are those of the groups, row by row and on average."""
    run = recorded(LOSSES[name], tmp_path / "run")
    state = run.state(run.steps)
    model = nn.Linear(5, 3).double()
    model.load_state_dict(state.params)
    truth = losses_in_groups(run, model, size)
    for query in (
        backtrail.Loss(data(), batch=size),
        backtrail.Loss(data(), batch=size, aggregate="mean"),
    ):
        wanted = truth if query.selection.aggregate is None else truth.mean()[None]
        read = values(query, run.task, params=state.params, buffers={})
        torch.testing.assert_close(read, wanted.detach())
        _, slopes, _ = gradients(
            query, run.task, params=state.params, buffers={}, trained=["weight"]
        )
        for number, slope in zip(wanted, slopes["weight"], strict=True):
            (expected,) = torch.autograd.grad(number, model.weight, retain_graph=True)
            torch.testing.assert_close(slope, expected)
    base = backtrail.retrain(run, backtrail.Loss(data(), batch=size), [[0]]).base[:, 0]
    np.testing.assert_allclose(base, truth.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_alone_is_refused(name: str, tmp_path: Path) -> None:
    """Its loss says nothing, and the message says what to give."""
    run = recorded(LOSSES[name], tmp_path / "run")
    for query in (backtrail.Loss(data(), [3]), backtrail.Loss(data(), batch=1)):
        with pytest.raises(CoupledRows, match="samples= all rows that belong together"):
            backtrail.DIT().attribute(run, query)
        with pytest.raises(CoupledRows):
            backtrail.leave_one_out(run, query, samples=[0])


def test_more_rows_than_a_pass_holds_need_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the default size of a pass would decide what the query means."""
    run = recorded(contrastive, tmp_path / "run")
    monkeypatch.setattr("backtrail.queries.selection.ROWS", 8)
    with pytest.raises(CoupledRows, match="batch=, how many of the 12 rows"):
        backtrail.DIT().attribute(run, backtrail.Loss(data(), aggregate="mean"))


@pytest.mark.parametrize("method", ["loss", "mean-loss", "tracin", "self-influence"])
def test_rankings_by_single_rows_are_refused(method: Any, tmp_path: Path) -> None:
    """They would read rows in groups of no meaning."""
    run = recorded(contrastive, tmp_path / "run")
    with pytest.raises(CoupledRows, match="DIT"):
        backtrail.find_mislabeled(run, method=method)


def test_noise_couples_no_rows() -> None:
    """Rows that draw numbers of their own are read row by row."""

    def noisy(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        step = torch.randint(1, 5, (len(batch[0]), 1))
        return model(batch[0] + torch.randn_like(batch[0]) / step), batch[1][:, :3]

    def distance(outputs: Any, batch: Any) -> Tensor:
        del batch
        return (outputs[0] - outputs[1]).square().sum(1)

    task = backtrail.Task(nn.Linear(5, 3).double(), data(), loss=distance, predict=noisy)
    query = backtrail.Loss(data(), [3])
    for _ in range(2):
        found = values(query, task, params=task.parameters(), buffers={})
        again, *_ = gradients(query, task, params=task.parameters(), buffers={}, trained=["bias"])
        assert torch.equal(found, again)
        torch.randn(3)
