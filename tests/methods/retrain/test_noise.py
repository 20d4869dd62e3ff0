"""Trainings in float32 that draw random numbers: re-runs in float64 draw the same ones."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import StrayedRerun
from backtrail.methods.retrain.retrain import retrain
from backtrail.run.run import Run

Draw = Callable[[Tensor], Tensor]
Watch = Callable[[Iterable[Any]], Iterable[Any]]
REMOVED = (0, 3, 7)


def in_place_transposed(x: Tensor) -> Tensor:
    """Numbers in a tensor whose memory is in another order, which `vmap` does not keep."""
    return torch.empty_like(x.T).normal_().T


def dropped(x: Tensor) -> Tensor:
    """Noise in the middle of a function of torch."""
    image = x[None, None].repeat(1, 2, 2, 2)
    return nn.functional.fractional_max_pool2d(image, 2, (len(x), x.shape[1]))[0, 0]


DRAWS: dict[str, Draw] = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "torch's default precision": lambda x: torch.randn(x.shape),
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "normal_": lambda x: torch.empty_like(x).normal_(0.5, 2.0),
    "uniform_": lambda x: torch.zeros_like(x).uniform_(-1, 1),
    "transposed": in_place_transposed,
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "randint": lambda x: torch.randint(0, 5, x.shape).to(x),
    "normal of tensors": lambda x: torch.normal(torch.zeros_like(x), torch.ones_like(x)),
    "normal of the input": lambda x: torch.normal(x.detach(), 0.5),
    "distribution": lambda x: torch.distributions.Normal(x, 0.5).rsample(),
    "laplace": lambda x: torch.distributions.Laplace(x, 0.5).rsample(),
    "pooling": dropped,
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
}


class Training:
    """A denoiser in float32 with momentum, whose order and noise a seed decides."""

    def __init__(self, draw: Draw) -> None:
        made = torch.Generator().manual_seed(1)
        self.data = TensorDataset(torch.randn(32, 6, generator=made))
        self.test = torch.randn(3, 6, generator=made)
        self.order = [torch.randperm(32, generator=made)[:16].tolist() for _ in range(8)]
        self.draw = draw

    def build(self) -> nn.Module:
        """Make the model anew."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Predict the noise."""
        noise = self.draw(batch[0])
        return model(batch[0] + noise), noise

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Squared error of each row, with another draw in it."""
        scale = 1 + 0.1 * torch.rand_like(batch[0])
        return (scale * (outputs[0] - outputs[1])).square().mean(1)

    def query(self, model: nn.Module) -> Tensor:
        """Size of the prediction for three rows."""
        rows: Tensor = self.test.to(next(iter(model.parameters())))
        return model(rows).square().mean(1)

    def train(self, model: nn.Module, removed: int | None = None, watch: Watch = iter) -> Tensor:
        """Train, without one sample perhaps; return the queries."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return self.steps(model, optimizer, removed, watch)

    def steps(self, model: nn.Module, optimizer: Any, removed: int | None, watch: Watch) -> Tensor:
        """Train with an optimizer."""
        torch.manual_seed(5)
        loader = DataLoader(self.data, batch_sampler=self.order)
        for rows, batch in zip(self.order, watch(loader), strict=True):
            weights = torch.tensor([float(row != removed) for row in rows])
            losses = self.loss(self.predict(model, batch), batch)
            (losses * weights).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.query(model).detach()

    def task(self, model: nn.Module) -> backtrail.Task:
        """Describe it."""
        return backtrail.Task(model, self.data, loss=self.loss, predict=self.predict)

    def record(self, folder: Path) -> Run:
        """Record it."""
        model = self.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with backtrail.Recorder(folder, self.task(model), optimizer) as recorder:
            self.steps(model, optimizer, None, recorder.watch)
        return backtrail.open_run(folder, self.task(self.build()))

    def removal_effects(self) -> np.ndarray:
        """Change of the queries by own retraining, `[query, sample]`."""
        base = self.train(self.build())
        changes = [self.train(self.build(), removed) - base for removed in REMOVED]
        found: np.ndarray = torch.stack(changes, 1).numpy()
        return found


@pytest.mark.parametrize("name", DRAWS)
def test_a_float64_rerun_draws_the_numbers_of_the_training(name: str, tmp_path: Path) -> None:
    """Removals change the queries as they do in the user's own loop."""
    training = Training(DRAWS[name])
    run = training.record(tmp_path / "run")
    queries = backtrail.Custom(training.query, labels=list("abc"))
    truth = training.removal_effects()
    for dtype in (torch.float64, None):
        found = backtrail.leave_one_out(run, queries, samples=REMOVED, dtype=dtype)
        np.testing.assert_allclose(found, truth, rtol=1e-3, atol=2e-3 * np.abs(truth).max())


def test_trust_accepts_a_right_influence_of_a_noisy_training(tmp_path: Path) -> None:
    """Sweep and re-runs draw the same numbers, so the derivative is right."""
    training = Training(torch.randn_like)
    run = training.record(tmp_path / "run")
    queries = backtrail.Custom(training.query, labels=list("abc"))
    found = backtrail.trust(run, backtrail.DIT().attribute(run, queries), removals=4)
    assert found.derivative is not None
    assert found.derivative.error < 1e-4
    assert found.remarks == ()


def numbers_of_a_double(x: Tensor) -> Tensor:
    """Other numbers whenever the model is in double precision, on purpose."""
    shift = 0.0 if x.dtype == torch.float32 else 3.0
    return torch.randn_like(x) + shift


def test_a_rerun_that_is_another_training_is_refused(tmp_path: Path) -> None:
    """The first step with another gradient is named, and what to type instead."""
    training = Training(numbers_of_a_double)
    run = training.record(tmp_path / "run")
    queries = backtrail.Custom(training.query, labels=list("abc"))
    with pytest.raises(StrayedRerun, match=r"step 0 has another gradient.*dtype=None"):
        backtrail.leave_one_out(run, queries, samples=REMOVED)
    found = backtrail.leave_one_out(run, queries, samples=REMOVED, dtype=None)
    truth = training.removal_effects()
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-4)


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any difference from the recorded training counts as another way."""
    monkeypatch.setattr("backtrail.methods.retrain.stacks.STRAYED", 1e-12)
    yield


@pytest.mark.usefixtures("rough")
def test_a_chaotic_rerun_is_remarked_on(tmp_path: Path) -> None:
    """Where every single gradient agrees, rounding has grown: the result says so."""
    training = Training(torch.randn_like)
    run = training.record(tmp_path / "run")
    queries = backtrail.Custom(training.query, labels=list("abc"))
    found = retrain(run, queries, [[0]])
    assert len(found.remarks) == 1
    assert "differences in rounding grow" in found.remarks[0]
    assert found.precision == "float64"
