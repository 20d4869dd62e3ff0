"""Trainings whose per-sample gradients are captured while they run, and the same without the capture."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.utils.data import DataLoader

import backtrail
from backtrail.run.run import Run
from backtrail.run.store import Store
from tests.cases import Case, mlp, record, rows


def projected(**settings: Any) -> backtrail.DataValueEmbedding:
    """With a projection that loses something, and a recursion that goes back over every step."""
    chosen: dict[str, Any] = {"rank": 6, "damping": 0.5}
    return backtrail.DataValueEmbedding(**chosen | settings)


def without_capture(run: Run) -> Run:
    """The same recording as if nothing had been captured."""
    files = {
        name: hash for name, hash in run.manifest.files.items() if not name.startswith("rows/")
    }
    return Run(
        Store(run.path, msgspec.structs.replace(run.manifest, files=files)), run.task, run.log
    )


def captured_files(run: Run) -> list[str]:
    """Files of the capture."""
    return sorted(name for name in run.manifest.files if name.startswith("rows/"))


def assert_same_as_replayed(run: Run, made: backtrail.DataValueEmbedding) -> None:
    """Assert that what was captured is what a replay finds, but for rounding."""
    assert captured_files(run)
    ours, theirs = made.embed(run), made.embed(without_capture(run))
    largest = np.abs(theirs.values()).max()
    assert largest > 0
    np.testing.assert_allclose(ours.values(), theirs.values(), rtol=0, atol=1e-11 * largest)
    np.testing.assert_allclose(
        ours._store.read("loss"), theirs._store.read("loss"), rtol=1e-12, atol=0
    )


def captured_case(case: Case, path: Path, made: backtrail.DataValueEmbedding) -> Run:
    """A training that was captured while it ran."""
    model, data = case.built(), rows()
    record(case, model, data, path, capture=made)
    return backtrail.open_run(path, case.task(model, data))


def captured_training(
    path: Path,
) -> tuple[backtrail.Task, torch.optim.Optimizer, backtrail.Recorder, "DataLoader[Any]"]:
    """A training that is about to be captured."""
    data, model = rows(), mlp().double()
    task, optimizer = (
        backtrail.classification(model, data),
        torch.optim.AdamW(model.parameters(), lr=0.01),
    )
    recorder = backtrail.Recorder(path, task, optimizer, capture=projected())
    return task, optimizer, recorder, DataLoader(data, batch_size=3)
