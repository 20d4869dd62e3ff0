"""Gradients sketched before the step, with rates predicted for it, are right or replayed."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import backtrail
from backtrail.errors import NotCaptured
from backtrail.methods.dve.live import early_rates as early
from backtrail.methods.dve.live import files as kept_rows
from backtrail.methods.dve.live.files import KeptRows
from backtrail.methods.dve.live.hooks import BatchHooks
from backtrail.methods.dve.projection import projection
from backtrail.methods.dve.step_features import factors
from backtrail.run.run import Run
from backtrail.step.step import MicroBatch
from tests.cases import ADAMW, Case, mlp, one_group, rows
from tests.loops import backward, refused
from tests.methods.dve.live_training import (
    assert_same_as_replayed,
    captured_case,
    captured_training,
    projected,
)

Between = Callable[
    [torch.optim.Optimizer, int], None
]  # what a loop does between backward pass and step


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rates of every parameter be predicted as soon as its gradient is there."""
    monkeypatch.setattr(early, "WAITING_ENTRIES", 1)


def train(path: Path, between: Between, **options: Any) -> Run:
    """Record six steps with a capture; `between` is called before every step of the optimizer."""
    data = rows()
    model = mlp().double()
    task = backtrail.classification(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with backtrail.Recorder(path, task, optimizer, capture=projected(**options)) as recorder:
        for _ in range(2):
            for number, (inputs, labels) in enumerate(
                recorder.watch(DataLoader(data, batch_size=3))
            ):
                backward(nn.functional.cross_entropy(model(inputs), labels))
                between(optimizer, number)
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(path, task)


def kept(run: Run) -> list[bool]:
    """Return for every step whether its capture was kept."""
    found = KeptRows(run, projected()._settings_of_rows)
    return [found.step(step) is not None for step in range(run.steps)]


def nothing(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Do nothing, as most loops."""


def schedule(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Set the learning rate after the backward pass."""
    optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)


def clip(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Write to the gradients after the backward pass."""
    del number
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.mul_(1.0)


@pytest.mark.parametrize(("between", "lost"), [(nothing, None), (schedule, 1), (clip, 0)])
def test_what_happens_before_the_step(between: Between, lost: int | None, tmp_path: Path) -> None:
    """A wrong prediction loses one step's capture; all later steps wait for the optimizer."""
    run = train(tmp_path / "run", between)
    assert kept(run) == [step != lost for step in range(6)]
    assert_same_as_replayed(run, projected())


def warm_up(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Set a learning rate that begins at zero."""
    optimizer.param_groups[0]["lr"] = 0.005 * number


def test_a_rate_of_zero(tmp_path: Path) -> None:
    """Visits in a step with rate zero have no influence, and other steps have theirs."""
    run = train(tmp_path / "run", warm_up)
    assert run.step(0).settings[0]["lr"] == 0.0
    assert_same_as_replayed(run, projected())
    values = projected().embed(run).values()
    assert (values[0] == 0).all()
    assert (values[1] != 0).any()
    left, right = factors(projection({"w": (3, 2)}), {"w": torch.zeros(3, 2)})["w"]
    assert (left[:, None] * right == 0).all()


def test_accumulated_gradients(tmp_path: Path) -> None:
    """Accumulating a second micro-batch loses the capture of the first step alone."""
    run = captured_case(
        Case("adamw", one_group(ADAMW, lr=0.01), accumulate=2), tmp_path / "run", projected()
    )
    assert not kept(run)[0]
    assert all(kept(run)[1:])
    assert_same_as_replayed(run, projected())


def test_cotangents_do_not_wait_for_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cotangent is held any more when the backward pass is over."""
    waiting = []

    def note(optimizer: torch.optim.Optimizer, number: int) -> None:
        del optimizer, number
        waiting.append(len(heard()._kept))  # type: ignore[union-attr]

    heard: Callable[[], BatchHooks | None] = lambda: None  # noqa: E731
    real = BatchHooks.enter

    def noting(self: BatchHooks) -> None:
        nonlocal heard
        heard = weakref.ref(self)
        real(self)

    monkeypatch.setattr(BatchHooks, "enter", noting)
    train(tmp_path / "run", note, fisher="empirical")
    assert waiting == [0] * 6


def test_rows_that_are_wrong_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped gradients are found at the next check, and rows since the last one are dropped."""
    real = BatchHooks.rows

    def swapped(self: BatchHooks, piece: MicroBatch) -> dict[str, Tensor]:
        wrong = piece.transition.step.index >= 3
        return {
            name: array.flip(0) if wrong else array for name, array in real(self, piece).items()
        }

    monkeypatch.setattr(BatchHooks, "rows", swapped)
    monkeypatch.setattr(kept_rows, "FILE_STEPS", 1)
    with refused(NotCaptured, "Step 4", "do not add up to the gradient of"):
        train(tmp_path / "run", nothing)
    data = rows()
    model = mlp().double()
    run = backtrail.open_run(tmp_path / "run", backtrail.classification(model, data))
    assert kept(run) == [True, True, False, False]
    assert_same_as_replayed(run, projected())


def test_a_scaled_loss_is_refused(tmp_path: Path) -> None:
    """A scaled loss is refused, as its cotangents are never unscaled."""
    task, optimizer, recorder, loader = captured_training(tmp_path / "run")
    with (
        refused(NotCaptured, "Step 1", "scaled loss"),
        recorder,
    ):  # the first step is left to a replay
        for inputs, labels in recorder.watch(loader):
            backward(1024 * nn.functional.cross_entropy(task.model(inputs), labels))
            for parameter in task.model.parameters():
                assert parameter.grad is not None
                parameter.grad /= 1024
            optimizer.step()
            optimizer.zero_grad()
