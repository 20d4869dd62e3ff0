"""The recorder does not change the training."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import backtrail
from backtrail.step.state import State
from tests.loops import (
    Augmented,
    Loop,
    adam,
    bytes_of,
    mlp,
    recording,
    rows,
    stochastic_mlp,
    watch_of,
)
from tests.processes import in_fresh_process

LOADERS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "in order": {"shuffle": False},
    "own generator": {"generator": torch.Generator()},
    "workers": {"num_workers": 2},
    # The workers of such a loader live on between epochs.
    "persistent workers": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
}
SHARED = np.random.default_rng()


def torch_global() -> float:
    """Draw from torch's global generator."""
    return float(torch.randn(()))


def numpy_global() -> float:
    """Draw from NumPy's global generator."""
    return float(np.random.normal())


def python_global() -> float:
    """Draw from Python's global generator."""
    return random.gauss(0, 1)


def module_global() -> float:
    """Draw from a generator that is a global variable of the user's module."""
    return float(SHARED.normal())


class Private:
    """Draws from generators that belong to the data set."""

    def __init__(self) -> None:
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = {"deep": [np.random.default_rng(2)]}
        self.old = np.random.RandomState(3)
        self.python = random.Random(4)

    def __call__(self) -> float:
        """Return a sum of draws of all generators."""
        noise = float(self.numpy["deep"][0].normal() + self.old.normal())
        return float(torch.randn((), generator=self.torch)) + noise + self.python.gauss(0, 1)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Make an SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def world() -> tuple[Any, ...]:
    """Return the states of the global generators."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def final(
    loop: Loop, recorder: backtrail.Recorder | None, loader: dict[str, Any]
) -> tuple[State, tuple[Any, ...]]:
    """Train; return the last state, and the states of all generators after it."""
    SHARED.bit_generator.state = np.random.PCG64(3).state
    torch.manual_seed(11), np.random.seed(12), random.seed(13)
    with recording(recorder):
        loop.train(watch_of(recorder), loop.loader(**loader), epochs=3)
    return loop.current_state(), (*world(), SHARED.bit_generator.state["state"])


def unchanged(make: Callable[[], Loop], path: Path, loader: dict[str, Any], **options: Any) -> None:
    """Assert that the training ends in the same bits with a recorder and without."""
    alone = final(make(), None, loader)
    loop = make()
    accompanied = final(loop, loop.recorder(path, **options), loader)
    assert bytes_of(alone[0]) == bytes_of(accompanied[0])
    assert alone[1] == accompanied[1]


@pytest.mark.parametrize("make", [mlp, stochastic_mlp])
@pytest.mark.parametrize("optimizer", [momentum, adam])
@pytest.mark.parametrize("loader", LOADERS)
def test_weights_and_moments_keep_their_bits(
    make: Callable[[], nn.Module], optimizer: Any, loader: str, *, tmp_path: Path
) -> None:
    """Weights, moments, buffers and generators are the same with a recorder."""
    in_fresh_process(partial(is_unchanged, make, optimizer, loader, path=tmp_path / "run"))


def is_unchanged(make: Callable[[], nn.Module], optimizer: Any, named: str, *, path: Path) -> None:
    """Assert that a training is unchanged with one of the loaders."""
    loader = LOADERS[named]

    def fresh() -> Loop:
        for generator in loader.values():
            if isinstance(generator, torch.Generator):
                generator.manual_seed(3)
        return Loop.of(make(), optimizer)

    unchanged(fresh, path, loader)


def augmented_is_unchanged(noise: Any, workers: int, path: Path) -> None:
    """Assert that a training on random rows is unchanged."""

    def fresh() -> Loop:
        return Loop.of(stochastic_mlp(), data=Augmented(noise() if noise is Private else noise))

    unchanged(fresh, path, {"num_workers": workers}, keep_batches=True)


@pytest.mark.parametrize(
    "noise", [torch_global, numpy_global, python_global, module_global, Private]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_draws_as_without_a_recorder(noise: Any, workers: int, tmp_path: Path) -> None:
    """Random rows are the same with a recorder, from every generator."""
    in_fresh_process(augmented_is_unchanged, noise, workers, tmp_path / "run")


def wasting_is_unchanged(noise: Any, path: Path) -> None:
    """Assert that a training on rows that draw noise and do not use it is unchanged."""
    draw = noise() if noise is Private else noise

    def fresh() -> Loop:
        again = noise() if noise is Private else draw
        return Loop.of(mlp(), data=Augmented(lambda: 0 * again()))

    unchanged(fresh, path, {})


@pytest.mark.parametrize(
    "noise", [torch_global, numpy_global, python_global, module_global, Private]
)
def test_the_proof_gives_back_what_it_draws(noise: Any, tmp_path: Path) -> None:
    """Rows that the recorder reads again leave the generators as they were."""
    in_fresh_process(wasting_is_unchanged, noise, tmp_path / "run")


def test_a_collate_function_with_its_own_generator_draws_on(tmp_path: Path) -> None:
    """A generator of the collate function is left as it was, too."""

    def fresh() -> Loop:
        draw = torch.Generator().manual_seed(8)

        def collate(items: list[Any]) -> Any:
            torch.randn((), generator=draw)
            last.append(draw)
            return torch.utils.data.default_collate(items)

        return Loop.of(mlp(), data=rows(), options={"collate": collate})

    last: list[torch.Generator] = []
    ends = []
    for record in (False, True):
        loop = fresh()
        recorder = loop.recorder(tmp_path / "run") if record else None
        with recording(recorder):
            loop.train(watch_of(recorder), loop.loader(collate_fn=loop.options["collate"]))
        ends.append(last[-1].get_state().tolist())
    assert ends[0] == ends[1]
