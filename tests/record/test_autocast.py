"""Trainings under autocast are replayed under it, and attributed in the parameters' precision."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import backtrail
from backtrail.errors import CoarseNoise, ReplayMismatch, UnexplainedGradient
from backtrail.methods.retrain.retrain import retrain
from backtrail.queries import values
from backtrail.run import journal
from backtrail.run.run import Run
from backtrail.step.step import Transition
from tests.loops import (
    Loop,
    adam,
    autocast_training,
    mlp,
    recorded_loop,
    refused,
    rows,
    stochastic_mlp,
)

Watch = Callable[[Any], Any]
LOW = torch.bfloat16


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Make an SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


@pytest.mark.parametrize("model", [mlp, stochastic_mlp])
def test_a_run_under_autocast_is_replayed_to_rounding(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Log and check say which steps were under autocast, and how far plain gradients are."""
    loop = Loop.of(model())
    run = recorded_loop(loop, tmp_path / "run", autocast_training(loop, full=(1, 2)))
    assert [step.autocast for step in run.log[:4]] == ["bfloat16", "", "", "bfloat16"]
    assert run.table()["autocast"].to_list() == [step.autocast for step in run.log]
    found = run.verify()
    assert found.difference < 1e-7
    assert 1e-4 < found.gap < 5e-2
    assert str(found).endswith(
        "Trained and replayed under autocast bfloat16; influence is computed without it, where "
        f"gradients differ by up to {found.gap:.1e}"
    )


def test_the_recorder_leaves_a_training_under_autocast_alone(tmp_path: Path) -> None:
    """The weights are equal bit for bit with a recorder and without."""
    torch.manual_seed(1)
    alone = Loop.of(stochastic_mlp())
    autocast_training(alone)(lambda loader: loader)
    torch.manual_seed(1)
    watched = Loop.of(stochastic_mlp())
    recorded_loop(watched, tmp_path / "run", autocast_training(watched))
    for ours, theirs in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(module._forward_pre_hooks for module in watched.model.modules())


def test_without_autocast_nothing_is_said_of_it(tmp_path: Path) -> None:
    """Neither log nor check of a plain training mention autocast."""
    run = recorded_loop(Loop.of(mlp()), tmp_path / "run")
    assert {step.autocast for step in run.log} == {""}
    assert "autocast" not in str(run.verify())


def test_a_loss_outside_of_autocast_is_within_the_tolerance(tmp_path: Path) -> None:
    """A loss taken outside of autocast replays within the default tolerance."""
    loop = Loop.of(mlp())
    with loop.recorder(tmp_path / "run") as recorder:
        autocast_training(loop, outside=True)(recorder.watch)
    found = backtrail.open_run(tmp_path / "run", loop.task()).verify()
    assert 0 < found.difference < 5e-2


def test_a_loop_that_does_something_else_is_still_found_out(tmp_path: Path) -> None:
    """A loss that differs from the task's is found in spite of the wider tolerance."""
    loop = Loop.of(
        mlp(), options={"reduce": lambda batches: torch.full((len(batches[0][0]),), 1 / 5)}
    )
    with refused(UnexplainedGradient, "Step 0", "tolerance 0.05"):
        recorded_loop(loop, tmp_path / "run", autocast_training(loop))


def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay without autocast, as a stand-in for a machine whose kernels round otherwise."""
    monkeypatch.setattr(Transition, "recorded_autocast", lambda _: nullcontext())


def test_a_replay_that_rounds_elsewhere_passes_up_to_a_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that rounds otherwise passes with the default tolerance, and not with 1e-6."""
    loop = Loop.of(mlp())
    run = recorded_loop(loop, tmp_path / "run", autocast_training(loop))
    without_autocast(monkeypatch)
    assert 1e-6 < run.verify().difference < 5e-2
    with pytest.raises(ReplayMismatch, match="tolerance 1e-06"):
        run.verify(tolerance=1e-6)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("model", [mlp, stochastic_mlp])
def test_trust_checks_the_derivative_along_the_recorded_training(
    model: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    tmp_path: Path,
) -> None:
    """The derivative is right where sweep and re-runs add autocast's change of every gradient."""
    loop = Loop.of(model(), optimizer)
    run = recorded_loop(loop, tmp_path / "run", autocast_training(loop))
    influence = backtrail.DIT().attribute(run, backtrail.Loss(rows(5, seed=1), aggregate="mean"))
    statement = backtrail.trust(run, influence, removals=4)
    assert "under autocast bfloat16" in str(statement).splitlines()[0]
    assert statement.derivative is not None
    assert statement.derivative.error < 2e-4
    assert statement.derivative.uncertainty < 1e-3


def test_re_runs_stay_on_the_recorded_training(tmp_path: Path) -> None:
    """The unperturbed re-run, in float64, ends at the recorded training's queries."""
    loop = Loop.of(mlp(), sgd)
    run = recorded_loop(loop, tmp_path / "run", autocast_training(loop))
    query = backtrail.Loss(rows(5, seed=1))
    end = run.state(run.steps)
    truth = values(query, run.task, params=end.params, buffers=end.buffers)
    found = retrain(run, query, [[0]])
    np.testing.assert_allclose(found.base[:, 0], truth.numpy(), rtol=1e-5)
    assert np.abs(found.change).max() > 1e-4


def test_logs_from_before_autocast_was_noted_are_read(tmp_path: Path) -> None:
    """A log without the column for autocast can be read."""
    run: Run = recorded_loop(Loop.of(mlp()), tmp_path / "run")
    assert journal.from_table(run.table().drop("autocast")) == list(run.log)


class Noisy(nn.Module):
    """A network that adds noise to its activations, in their precision or in another."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.body = mlp()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add noise to the outputs, which autocast makes bfloat16."""
        outputs = self.body(x)
        noise = torch.randn_like(outputs, dtype=self.dtype)
        return torch.as_tensor(outputs + 0.1 * noise)


def test_noise_in_the_precision_of_autocast_is_refused(tmp_path: Path) -> None:
    """Derivatives are taken without autocast, and would draw other numbers."""
    loop = Loop.of(Noisy(None))
    with pytest.raises(CoarseNoise, match=r"randn_like in bfloat16.*dtype=torch\.float32"):
        recorded_loop(loop, tmp_path / "run", autocast_training(loop))
    loop = Loop.of(Noisy(torch.float32))
    run = recorded_loop(loop, tmp_path / "second", autocast_training(loop))
    run.verify()
