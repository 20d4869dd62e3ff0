"""Losses of a whole batch: influence equals finite differences of an independent loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import (
    BadSetting,
    BadTotal,
    CannotRenormalize,
    NoRowLosses,
    UnexplainedGradient,
)
from tests.loops import backward, refused

ROWS = 10
STEP = 1e-5


def data() -> TensorDataset:
    """Inputs `[row, 3]` and masks `[row, 4]`."""
    draw = torch.Generator().manual_seed(2)
    inputs = torch.randn(ROWS, 3, generator=draw, dtype=torch.float64)
    return TensorDataset(inputs, (torch.rand(ROWS, 4, generator=draw) > 0.5).double())


def network() -> nn.Sequential:
    """Make a network, always from the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def dice(outputs: Tensor, batch: Any, weights: Tensor) -> Tensor:
    """One minus the weighted overlap: a quotient of two sums over the batch."""
    probability = outputs.sigmoid()
    overlap = (weights[:, None] * probability * batch[1]).sum()
    return 1 - 2 * overlap / (weights[:, None] * (probability + batch[1])).sum()


def decorrelated(outputs: Tensor, batch: Any, weights: Tensor) -> Tensor:
    """VICReg's idea: a mean error, and the off-diagonal entries of a weighted covariance."""
    share = weights / weights.sum()
    centred = outputs - (share[:, None] * outputs).sum(0)
    covariance = centred.T @ (share[:, None] * centred)
    off_diagonal = covariance - torch.diag(torch.diagonal(covariance))
    error = (share * (outputs - batch[1]).square().mean(1)).sum()
    return error + off_diagonal.square().sum()


def query(model: nn.Module) -> Tensor:
    """Two numbers of the model."""
    outputs: Tensor = model(torch.ones(2, 3, dtype=torch.float64))
    return outputs.square().sum(1)


def trained(total: Any, weights: Tensor, watch: Any = None, *, accumulated: int = 1) -> nn.Module:
    """Train two epochs with weights of the samples, in a loop of its own."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    loop(model, optimizer, total, weights, watch=watch, accumulated=accumulated)
    return model


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total: Any,
    weights: Tensor,
    *,
    watch: Any = None,
    accumulated: int = 1,
) -> None:
    """Train two epochs."""
    loader = DataLoader(data(), batch_size=5 if accumulated > 1 else 4)
    for _ in range(2):
        first = 0
        for number, batch in enumerate(watch(loader) if watch else loader):
            of_batch = weights[first : first + len(batch[0])]
            first += len(batch[0])
            backward(total(model(batch[0]), batch, of_batch) / accumulated)
            if (number + 1) % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()


def recorded(total: Any, path: Path, *, accumulated: int = 1) -> Any:
    """Record the training."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    task = backtrail.Task(model, data(), total=total)
    ones = torch.ones(ROWS, dtype=torch.float64)
    with backtrail.Recorder(path, task, optimizer) as recorder:
        loop(model, optimizer, total, ones, watch=recorder.watch, accumulated=accumulated)
    run = backtrail.open_run(path, backtrail.Task(network(), data(), total=total))
    run.verify()
    return run


def changed(total: Any, sample: int, weight: float, accumulated: int) -> np.ndarray:
    """The query after a training in which one sample has another weight."""
    weights = torch.ones(ROWS, dtype=torch.float64)
    weights[sample] = weight
    model = trained(total, weights, accumulated=accumulated)
    return query(model).detach().numpy()


@pytest.mark.parametrize(("total", "accumulated"), [(dice, 1), (decorrelated, 1), (dice, 2)])
def test_influence_of_a_batch_loss(total: Any, accumulated: int, tmp_path: Path) -> None:
    """DIT is minus the derivative by a sample's weight; leave-one-out is a weight of 0."""
    run = recorded(total, tmp_path / "run", accumulated=accumulated)
    queries = backtrail.Custom(query, labels=["a", "b"])
    influence = backtrail.DIT().attribute(run, queries)
    removed = backtrail.leave_one_out(run, queries, samples=range(3))
    base = changed(total, 0, 1.0, accumulated)
    for sample in range(3):
        up = changed(total, sample, 1 + STEP, accumulated)
        down = changed(total, sample, 1 - STEP, accumulated)
        slope = (up - down) / (2 * STEP)
        np.testing.assert_allclose(influence.total()[:, -1, sample], -slope, rtol=1e-6, atol=1e-9)
        without = changed(total, sample, 0.0, accumulated) - base
        np.testing.assert_allclose(removed[:, sample], without, rtol=1e-9, atol=1e-12)
    assert np.isnan(influence.to_xarray().loss.values).all()


def test_what_needs_losses_of_rows_is_refused(tmp_path: Path) -> None:
    """TracIn, a query of losses and a renormalized denominator say what to use instead."""
    run = recorded(dice, tmp_path / "run")
    queries = backtrail.Custom(query, labels=["a", "b"])
    with refused(NoRowLosses, "Task(total=...)", "backtrail.DIT()"):
        backtrail.TracIn().attribute(run, queries)
    with refused(NoRowLosses, "backtrail.Custom"):
        backtrail.DIT().attribute(run, backtrail.Loss(data(), samples=[0]))
    with refused(CannotRenormalize, "Task(total=...)"):
        backtrail.DIT(denominator="renormalize").attribute(run, queries)


def test_a_total_that_is_not_the_loops(tmp_path: Path) -> None:
    """The self-check compares it with the loop, and its shape is checked."""
    ones = torch.ones(ROWS, dtype=torch.float64)
    for error, total in ((UnexplainedGradient, decorrelated), (BadTotal, lambda *given: given[0])):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        task = backtrail.Task(model, data(), total=total)
        path = tmp_path / error.__name__
        with refused(error), backtrail.Recorder(path, task, optimizer) as recorder:
            loop(model, optimizer, dice, ones, watch=recorder.watch)
    with refused(BadSetting, "loss"):
        backtrail.Task(model, data())
    with refused(BadSetting, "reduce"):
        backtrail.Task(model, data(), total=dice, reduce=lambda _: torch.ones(4))
