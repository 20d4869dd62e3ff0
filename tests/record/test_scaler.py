"""A run with a GradScaler holds the steps that were made, with the gradients they used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.run.run import Run
from tests.loops import Loop, backward, mlp, rows, sample_numbers, sequential_batches

Watch = Callable[[Any], Any]
BROKEN = {2, 5, 8}  # batches whose loss is infinite
CLIP = 0.5


def scaled(
    loop: Loop, *, every: int, low: torch.dtype | None, clips: bool
) -> Callable[[Watch], None]:
    """Return the loop of torch's documentation, with accumulation and some infinite losses."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def train(watch: Watch) -> None:
        for number, batch in enumerate(loop.saving_states(watch(loop.loader(shuffle=False)))):
            with torch.autocast("cpu", low, enabled=low is not None):
                loss = cross_entropy(loop.model(batch[0]), batch[1]) / every
            backward(scaler.scale(loss * (float("inf") if number in BROKEN else 1.0)))
            if number % every < every - 1:
                continue
            if clips:
                scaler.unscale_(loop.optimizer)
                nn.utils.clip_grad_norm_(loop.model.parameters(), CLIP)
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()

    return train


def taken(every: int) -> list[list[tuple[int, ...]]]:
    """Return the samples of the steps without an infinite loss."""
    batches = sequential_batches(40, 4)
    groups = [range(first, first + every) for first in range(0, len(batches), every)]
    return [[batches[number] for number in group] for group in groups if not BROKEN & set(group)]


def adam(*, fused: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Make an AdamW; a fused one is called for skipped steps too, and unscales by itself."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
def test_the_steps_taken_are_the_steps_recorded(
    every: int, low: torch.dtype | None, tmp_path: Path, *, fused: bool
) -> None:
    """Only steps with finite losses are recorded, and their states replay."""
    loop = Loop.of(mlp(), adam(fused=fused), data=rows(40))
    run = opened(loop, tmp_path / "run", scaled(loop, every=every, low=low, clips=False))
    assert sample_numbers(run) == taken(every)
    found = run.verify()
    assert found.difference < (1e-3 if low == torch.float16 else 1e-5)
    assert ("replayed and attributed without it" in str(found)) == (low == torch.float16)


@pytest.mark.parametrize("every", [1, 2])
def test_gradients_clipped_after_unscaling_are_explained(every: int, tmp_path: Path) -> None:
    """Clipping of the unscaled gradient is that of the task."""
    loop = Loop.of(
        mlp(), adam(fused=False), data=rows(40), options={"clip": backtrail.ClipNorm(CLIP)}
    )
    run = opened(loop, tmp_path / "run", scaled(loop, every=every, low=None, clips=True))
    assert sample_numbers(run) == taken(every)
    assert max(step.norm for step in run.log) <= CLIP * (1 + 1e-5)
    assert run.verify().difference < 1e-5


def opened(loop: Loop, path: Path, train: Callable[[Watch], None]) -> Run:
    """Record a loop and open its run."""
    with loop.recorder(path) as recorder:
        train(recorder.watch)
    return backtrail.open_run(path, loop.task())


def test_trust_understands_a_training_in_float16(tmp_path: Path) -> None:
    """Sweep and re-runs of a training in float16 agree."""
    loop = Loop.of(mlp(), lambda model: torch.optim.SGD(model.parameters(), lr=0.2), data=rows(40))
    run = opened(loop, tmp_path / "run", scaled(loop, every=1, low=torch.float16, clips=False))
    statement = backtrail.trust(
        run, backtrail.DIT().attribute(run, backtrail.Loss(loop.data, aggregate="mean")), removals=4
    )
    assert "Trained under autocast float16" in str(statement)
    assert statement.derivative is not None
    assert statement.derivative.passed
