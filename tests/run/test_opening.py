"""Runs with the wrong model, the wrong data, or files that are missing or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import backtrail
from backtrail.errors import (
    BadQuery,
    BadSetting,
    DamagedFile,
    EmptyRun,
    MissingState,
    NoSuchState,
    NotARun,
    ReplayMismatch,
    WrongData,
    WrongFormat,
    WrongModel,
)
from backtrail.run.background import BackgroundThread
from backtrail.run.run import Run
from tests.loops import ROWS, Loop, mlp, recorded_loop, refused, rows, stochastic_mlp


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Record a run of twelve steps."""
    return recorded_loop(Loop.of(stochastic_mlp()), tmp_path / "run")


def reopened(run: Run, model: nn.Module | None = None, data: Any = None) -> Run:
    """Open a run with another model or data set."""
    return backtrail.open_run(
        run.path,
        backtrail.classification(
            model or stochastic_mlp(), run.task.data if data is None else data
        ),
    )


def test_another_model(run: Run) -> None:
    """The message names every tensor that differs, with both shapes."""
    other = stochastic_mlp()
    other[4] = nn.Linear(8, 5)
    with refused(
        WrongModel,
        "'4.bias' has shape [5]",
        "[3]",
        "'4.weight' has shape [5, 8]",
        "recorded with [3, 8]",
    ):
        reopened(run, other)
    with refused(
        WrongModel,
        "'1.running_mean' [8] was recorded and is not in the model",
        "'2.bias' was not recorded",
    ):
        reopened(run, mlp())
    with refused(WrongModel, "'0.bias' is float64", "recorded as float32"):
        reopened(run, stochastic_mlp().double())


def test_data_of_another_length(run: Run) -> None:
    """A data set of another length is refused, with both lengths."""
    with refused(WrongData, "23 rows", f"had {ROWS}", "the data set of the training"):
        reopened(run, data=rows(23))


def test_other_rows_of_the_first_step(run: Run) -> None:
    """Other rows of the first step are found when the run is opened."""
    with refused(WrongData, "rows [", "of step 0"):
        reopened(run, data=rows(seed=1))


def test_other_rows_of_a_later_step(run: Run) -> None:
    """A single other row of a later step is found by `verify`."""
    changed = next(row for row in range(ROWS) if row not in run.log[0].samples)
    inputs, labels = (tensor.clone() for tensor in run.task.data.tensors)
    inputs[changed] += 1
    step = next(step.index for step in run.log if changed in step.samples)
    with refused(WrongData, f"batch 0 of step {step}", "and was"):
        reopened(run, data=TensorDataset(inputs, labels)).verify()


def test_another_loss(run: Run) -> None:
    """A task with another loss does not replay."""
    task = backtrail.classification(stochastic_mlp(), run.task.data, reduce="sum")
    with refused(ReplayMismatch, "Step 0", "norm of its gradient"):
        backtrail.open_run(run.path, task).verify()


def test_another_end_of_a_segment(run: Run) -> None:
    """A stored state that is not what the steps before lead to is found."""
    store = run.store
    path = run.path / "states" / "00000004.safetensors"
    path.write_bytes((run.path / "states" / "00000000.safetensors").read_bytes())
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["files"]["states/00000004.safetensors"] = store.manifest.files[
        "states/00000000.safetensors"
    ]
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    with refused(ReplayMismatch, "Step 3", "the state after it (replayed from state 0)"):
        reopened(run).verify()


@pytest.mark.parametrize("name", ["states/00000004.safetensors", "steps/00000000.parquet"])
def test_a_damaged_file(run: Run, name: str) -> None:
    """A damaged file is named, with both checksums."""
    path = run.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with refused(
        DamagedFile, str(path), "its checksum is", run.manifest.files[name], "record the run again"
    ):
        reopened(run).verify()


@pytest.mark.parametrize("name", ["states/00000004.safetensors", "steps/00000000.parquet"])
def test_a_missing_file(run: Run, name: str) -> None:
    """A missing file is named."""
    (run.path / name).unlink()
    with refused(DamagedFile, str(run.path / name), "it is missing"):
        reopened(run).verify()


def test_missing_and_damaged_batches(tmp_path: Path) -> None:
    """Stored batches that are damaged or missing are found when they are read."""
    run = recorded_loop(Loop.of(mlp()), tmp_path / "run", keep_batches=True)
    path = run.path / "batches" / "00000002.safetensors"
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first byte after the head
    path.write_bytes(content)
    with refused(DamagedFile, str(path), "its batch 0 has checksum", run.log[2].fed[0].digest):
        run.verify()
    path.unlink()
    with refused(DamagedFile, str(path), "No such file"):
        run.verify()


def test_a_damaged_journal(tmp_path: Path) -> None:
    """A truncated last line is ignored, and a damaged one before it refused."""
    loop = Loop.of(mlp())
    with pytest.raises(KeyError), loop.recorder(tmp_path) as recorder:
        loop.train(recorder.watch)
        raise KeyError
    path = tmp_path / "steps" / "00000000.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    assert backtrail.open_run(tmp_path, loop.task()).steps == 11
    path.write_bytes(b"".join(lines[:2]) + b"{]\n" + b"".join(lines[3:]))
    with refused(DamagedFile, str(path), "does not parse"):
        backtrail.open_run(tmp_path, loop.task())
    path.write_bytes(b"".join(lines[:2]) + b"".join(lines[3:]))
    with refused(DamagedFile, str(path), "it has step 3 in place of step 2"):
        backtrail.open_run(tmp_path, loop.task())


def test_no_manifest(run: Run) -> None:
    """A folder without a manifest is refused, with how to record a run."""
    (run.path / "manifest.json").unlink()
    with refused(NotARun, str(run.path), "backtrail.Recorder("):
        reopened(run)


def test_another_format(run: Run) -> None:
    """A run of another format is refused, with both formats."""
    path = run.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with refused(WrongFormat, str(path), "format 7", "reads format 2"):
        reopened(run)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}'])
def test_a_manifest_that_does_not_parse(run: Run, text: str) -> None:
    """A manifest that does not parse is named."""
    (run.path / "manifest.json").write_text(text)
    with refused(DamagedFile, "manifest.json"):
        reopened(run)


def test_a_run_without_steps(tmp_path: Path) -> None:
    """A run without a complete step is refused."""
    loop = Loop.of(mlp())
    with loop.recorder(tmp_path):
        pass
    with refused(EmptyRun, str(tmp_path), "no complete step"):
        backtrail.open_run(tmp_path, loop.task())


def test_states_and_steps_that_are_not_there(run: Run) -> None:
    """The message names the states or steps that there are, and how to replay."""
    with refused(
        MissingState, "State 6 was not stored", "0, 4, 8, 12", "replay=True", "from state 4"
    ):
        run.state(6)
    for number in (-1, 13):
        with refused(NoSuchState, f"no state {number}", "0 to 12"):
            run.state(number)
        with refused(NoSuchState, f"no step {number}", "0 to 11"):
            run.step(number)


def test_queries_of_rows_that_are_not_there(run: Run) -> None:
    """Queries of samples out of range, or of none, are refused."""
    for samples in ([3, 99], [-1]):
        with refused(
            BadQuery, f"samples={[s for s in samples if s != 3]}", f"the data set has {ROWS} rows"
        ):
            backtrail.Loss(run.task.data, samples=samples)
    with refused(BadSetting, "Invalid samples=[]", "one or more row numbers"):
        backtrail.Loss(run.task.data, samples=[])


def test_opening_leaves_the_model_alone(run: Run) -> None:
    """Opening and verifying neither read nor write the weights and modes of the task's model."""
    model = stochastic_mlp().eval()
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(float("nan"))
    again = reopened(run, model)
    again.verify()
    assert not model.training
    assert bool(model.get_parameter("0.weight").isnan().all())


def test_a_manifest_without_state_0_is_damaged(tmp_path: Path) -> None:
    """Nothing could be replayed: another state must not stand in its place."""
    loop = Loop.of(mlp())
    recorded_loop(loop, tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["states/00000000.safetensors"]
    manifest.write_text(json.dumps(content))
    with refused(DamagedFile, "manifest.json", "does not name state 0"):
        backtrail.open_run(tmp_path / "run", loop.task())


def test_work_after_a_failure_is_not_done() -> None:
    """A journal is not deleted if its segment could not be written."""
    thread = BackgroundThread()
    done: list[int] = []
    thread.submit(lambda: 1 / 0)
    thread.submit(lambda: done.append(1))
    with pytest.raises(ZeroDivisionError):
        thread.wait()
    thread.submit(lambda: done.append(2))
    thread.close()
    assert done == [2]
