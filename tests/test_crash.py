"""A recording or an attribution that is killed at any moment keeps what was complete."""

import random
import time
from pathlib import Path

import numpy as np
import pytest

import backtrail
from backtrail.errors import BadSetting, EmptyRun, NotARun
from backtrail.run.run import Run
from backtrail.step.state import State
from tests.loops import Loop, bytes_of, rows, stochastic_mlp
from tests.processes import in_fresh_process, start_process

# A few moments in every run of the tests, and many in the slow ones.
FEW_OR_MANY = pytest.mark.parametrize("kills", [8, pytest.param(24, marks=pytest.mark.slow)])
EPOCHS = 15


def loop() -> Loop:
    """Make a training that stores everything a run can store."""
    return Loop.of(stochastic_mlp(), data=rows(40))


def record(path: Path) -> None:
    """Record the training with its batches."""
    training = loop()
    with training.recorder(path, checkpoints=backtrail.Last(9), keep_batches=True) as recorder:
        training.train(recorder.watch, training.loader(), epochs=EPOCHS)


def attribute(run: Path, out: Path) -> None:
    """Attribute two queries at every epoch; resume what is there."""
    opened = backtrail.open_run(run, loop().task())
    queries = backtrail.Loss(opened.task.data, samples=[0, 3])
    backtrail.DIT(chunk=1).attribute(opened, queries, observed_at="epochs", out=out)


def seconds(work: object, *args: object) -> float:
    """Run a process to its end; return how long it took."""
    begun = time.perf_counter()
    process = start_process(work, *args)  # type: ignore[arg-type]
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - begun


def killed(work: object, *args: object, after: float) -> None:
    """Start a process, and kill it after a while unless it has ended."""
    process = start_process(work, *args)  # type: ignore[arg-type]
    process.join(after)
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that was not killed, and the seconds it took to record."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    record_first = seconds(record, path.with_name("warm"))
    return path, min(record_first, seconds(record, path))


def instants(span: float, kills: int) -> list[float]:
    """Draw moments from almost nothing to a little more than the whole span, one in each part."""
    draw = random.Random(6)
    part = 1.05 * span / (kills - 2)
    return [0.0, 0.01, *((number + draw.random()) * part for number in range(kills - 2))]


def check_prefix(run: Run, whole: Run) -> None:
    """Assert that a run is the beginning of the whole one, bit for bit."""
    run.verify()
    assert run.log == whole.log[: run.steps]
    for number in set(run.kept) & set(whole.kept):
        assert bytes_of(run.state(number)) == bytes_of(whole.state(number))
    end = run.state(run.steps, replay=True)
    assert bytes_of(end) == bytes_of(replayed(whole, run))


def replayed(whole: Run, run: Run) -> State:
    """Replay the whole run from the last state that the other run has stored to its end."""
    state = run.store.state(max(run.kept))
    for index in range(max(run.kept), run.steps):
        state = whole.transition(index).advance(state)
    return state


@FEW_OR_MANY
def test_a_killed_recording_opens_at_its_last_whole_step(
    undisturbed: tuple[Path, float], tmp_path: Path, kills: int
) -> None:
    """Log and states of a killed recording are the beginning of those of the whole one."""
    reference, span = undisturbed
    whole = backtrail.open_run(reference, loop().task())
    ends = []
    for number, delay in enumerate(instants(span, kills)):
        path = tmp_path / str(number)
        killed(record, path, after=delay)
        try:
            run = backtrail.open_run(path, loop().task())
        except (EmptyRun, NotARun):
            ends.append(0)
            continue
        check_prefix(run, whole)
        ends.append(run.steps)
    assert ends[0] == 0
    assert len(set(ends)) > kills // 3, f"the kills fell on too few steps: {ends}"


@FEW_OR_MANY
def test_a_killed_attribution_resumes_to_the_same_bits(
    undisturbed: tuple[Path, float], tmp_path: Path, kills: int
) -> None:
    """Killed several times and resumed, an attribution is equal to one sweep bit for bit."""
    reference, _ = undisturbed
    span = seconds(attribute, reference, tmp_path / "whole")
    whole = in_fresh_process(influence, tmp_path / "whole")
    # Four kills an attribution, which is resumed between them.
    delays = instants(span / 2, kills)
    done: set[int] = set()
    for number in range(kills // 4):
        out = tmp_path / str(number)
        for delay in delays[number :: kills // 4]:
            killed(attribute, reference, out, after=delay)
            done.add(len(list((out / "done").glob("*"))))
        seconds(attribute, reference, out)
        assert np.array_equal(in_fresh_process(influence, out), whole)
    assert len(done) > kills // 4, f"the kills fell on too few shards: {done}"


def influence(path: Path) -> np.ndarray:
    """Return the influence in a folder as an array."""
    found: np.ndarray = backtrail.open_influence(path).to_xarray()["influence"].values
    return found


def gather(run: Path, out: Path, part: tuple[int, int]) -> None:
    """Do one part of the pass over the training."""
    embedding().gather(backtrail.open_run(run, loop().task()), out=out, part=part)


def embedding() -> backtrail.DataValueEmbedding:
    """Return the method with the empirical Fisher matrix, which samples no labels."""
    return backtrail.DataValueEmbedding(rank=4, fisher="empirical", segments=2)


def test_processes_share_the_pass_over_a_training(
    undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Three processes share the pass over a training, and the embeddings are equal bit for bit."""
    run = backtrail.open_run(undisturbed[0], loop().task())
    out = tmp_path / "shared"
    processes = [start_process(gather, undisturbed[0], out, (part, 3)) for part in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob(".*"))
    done = len(list((out / "captured" / "done").iterdir()))
    found = embedding().embed(run, out=out)
    assert done == len(found.about.shards) > 3
    np.testing.assert_array_equal(found.values(), embedding().embed(run).values())
    with pytest.raises(BadSetting, match="part"):
        embedding().gather(run, out=out, part=(3, 3))
