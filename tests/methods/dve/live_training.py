"""Trainings whose gradients are captured while they run, and the same runs without the capture."""

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
    """Return the method with a projection to rank 6, which loses something."""
    chosen: dict[str, Any] = {"rank": 6, "damping": 0.5}
    chosen.update(settings)
    return backtrail.DataValueEmbedding(**chosen)


def without_capture(run: Run) -> Run:
    """Return the same run as if nothing had been captured, so that its steps are replayed."""
    files = run.manifest.files
    kept = {name: files[name] for name in files if not name.startswith("rows/")}
    manifest = msgspec.structs.replace(run.manifest, files=kept)
    return Run(Store(run.path, manifest), run.task, run.log)


def captured_files(run: Run) -> list[str]:
    """Return the names of the files that a capture wrote."""
    return sorted(name for name in run.manifest.files if name.startswith("rows/"))


def assert_same_as_replayed(run: Run, method: backtrail.DataValueEmbedding) -> None:
    """Assert that captured gradients give the embeddings of a replay, up to rounding."""
    assert captured_files(run)
    captured = method.embed(run)
    replayed = method.embed(without_capture(run))
    largest = np.abs(replayed.values()).max()
    assert largest > 0
    np.testing.assert_allclose(captured.values(), replayed.values(), rtol=0, atol=1e-11 * largest)
    np.testing.assert_allclose(
        captured._store.read("loss"), replayed._store.read("loss"), rtol=1e-12, atol=0
    )


def captured_case(case: Case, path: Path, method: backtrail.DataValueEmbedding) -> Run:
    """Record a case while its gradients are captured for `method`."""
    model = case.built()
    data = rows()
    record(case, model, data, path, capture=method)
    return backtrail.open_run(path, case.task(model, data))


def captured_training(
    path: Path,
) -> tuple[backtrail.Task, torch.optim.Optimizer, backtrail.Recorder, "DataLoader[Any]"]:
    """Return task, optimizer, capturing recorder and loader of a training with AdamW."""
    data = rows()
    model = mlp().double()
    task = backtrail.classification(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = backtrail.Recorder(path, task, optimizer, capture=projected())
    return task, optimizer, recorder, DataLoader(data, batch_size=3)
