"""What holds for every method of attribution."""

from pathlib import Path

import numpy as np
import pytest
import torch

import backtrail
from backtrail.errors import NoSuchState
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.result import sample_table
from tests.interruption import Interrupted
from tests.oracles.sums import sum_by_sample
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

Method = (
    backtrail.DIT
    | backtrail.PathIntegrated
    | backtrail.TracIn
    | backtrail.GradientDot
    | backtrail.DataValueEmbedding
    | backtrail.DiffIn
)
METHODS: dict[str, Method] = {
    "DIT": backtrail.DIT(),
    "PathIntegrated": backtrail.PathIntegrated(runs=2),
    "TracIn": backtrail.TracIn(),
    "TracIn, kept": backtrail.TracIn(states="kept"),
    "GradientDot": backtrail.GradientDot(),
    "DataValueEmbedding": backtrail.DataValueEmbedding(rank=8),
    "DiffIn": backtrail.DiffIn(2),
    "DiffIn, corrected": backtrail.DiffIn(2, "corrected", batch=4),
}
RUNS = ["adamw", "two groups", "accumulation, batchnorm", "twice in a batch", "short batches"]
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_run = pytest.mark.parametrize("name", RUNS)


@each_method
@each_run
def test_the_result_says_what_it_is(name: str, method: Method, tmp_path: Path) -> None:
    """The result has axes, samples, sign, unit, method, run and queries."""
    run = recorded_run(name, tmp_path)
    found = method.attribute(run, standard_queries(), observed_at=[1, run.steps])
    assert found.values().shape == (3, 2, run.steps, max(len(step.samples) for step in run.log))
    assert (found.sample == sample_table(run)).all()
    assert found.sign.startswith("what the query gains when the sample is removed")
    assert (found.unit, found.run, found.denominator) == ("custom", run.id, "keep")
    assert found.method == type(method).__name__
    assert found.queries == ("row 0", "row 2", "mean")
    assert found.query_object is not None


@each_method
@each_run
def test_what_cannot_have_influence_has_exactly_none(
    name: str, method: Method, tmp_path: Path
) -> None:
    """Padding, steps from the observed state on and samples never seen have exactly zero."""
    run = recorded_run(name, tmp_path)
    found = method.attribute(
        run, standard_queries(), observed_at="epochs" if name == "adamw" else [1, 2]
    )
    values = found.values()
    total = found.total()
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0
    assert (values[..., found.sample < 0] == 0).all()
    for column, state in enumerate(found.observed_at):
        assert (values[:, column, state:] == 0).all()
    unseen = sorted({*range(run.samples)} - {sample for step in run.log for sample in step.samples})
    assert (total[:, :, unseen] == 0).all()


@each_method
@each_run
def test_sums_are_the_whole(name: str, method: Method, tmp_path: Path) -> None:
    """Visits, and windows, add up to the total."""
    run = recorded_run(name, tmp_path)
    found = method.attribute(run, standard_queries(), observed_at=range(1, run.steps + 1))
    total = found.total()[:, -1]
    scale = np.abs(total).max()
    np.testing.assert_allclose(
        total, sum_by_sample(found.values()[:, -1], run), rtol=0, atol=1e-13 * scale
    )
    np.testing.assert_allclose(found.visits(0, run.steps), total, rtol=0, atol=1e-13 * scale)
    windows = sum(found.window(t, t + 1) for t in range(run.steps))
    np.testing.assert_allclose(windows, total, rtol=0, atol=1e-12 * scale)


@each_method
@each_run
def test_a_state_alone_has_the_same_answer(name: str, method: Method, tmp_path: Path) -> None:
    """The influence at a state does not depend on what else is observed."""
    run = recorded_run(name, tmp_path)
    together = method.attribute(run, standard_queries(), observed_at=[1, 2, run.steps]).values()
    for column, state in enumerate(sorted({1, 2, run.steps})):
        alone = method.attribute(run, standard_queries(), observed_at=state).values()[:, 0]
        np.testing.assert_allclose(
            together[:, column], alone, rtol=0, atol=1e-12 * np.abs(alone).max()
        )


@each_method
@each_run
def test_the_same_question_gives_the_same_bits(name: str, method: Method, tmp_path: Path) -> None:
    """Two attributions, and one read from disk, are equal bit for bit."""
    run = recorded_run(name, tmp_path)
    first = method.attribute(run, standard_queries(), observed_at="epochs").values()
    np.testing.assert_array_equal(
        method.attribute(run, standard_queries(), observed_at="epochs").values(), first
    )
    method.attribute(run, standard_queries(), observed_at="epochs", out=tmp_path / "out")
    np.testing.assert_array_equal(backtrail.open_influence(tmp_path / "out").values(), first)


# `PathIntegrated` writes its shards after all of its sweeps, which have shards of their own:
# tests/methods/path_integrated interrupts all of them.
SWEPT_ONCE = {name: made for name, made in METHODS.items() if name != "PathIntegrated"}


@pytest.mark.parametrize("method", SWEPT_ONCE.values(), ids=SWEPT_ONCE)
@pytest.mark.parametrize("name", RUNS[:3])
@pytest.mark.parametrize("anywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_attribution_that_was_killed_resumes_to_the_same_bits(
    name: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, anywhere: bool
) -> None:
    """Interrupted after any shard (or the first ones) and resumed, it has the same bits."""
    monkeypatch.setattr("backtrail.methods.result.SHORTEST", 1)
    run = recorded_run(name, tmp_path)
    states = [2, run.steps]
    whole = method.attribute(run, standard_queries(), observed_at=states).values()
    real = InfluenceWriter.mark_done
    for survived in range(run.steps) if anywhere else (0, 1):
        left = [survived]
        out = tmp_path / f"out{survived}"

        def failing(self: InfluenceWriter, shard: int, left: list[int] = left) -> None:
            if not left[0]:
                raise Interrupted
            left[0] -= 1
            real(self, shard)

        with monkeypatch.context() as patch:
            patch.setattr(InfluenceWriter, "mark_done", failing)
            with pytest.raises(Interrupted):
                method.attribute(run, standard_queries(), observed_at=states, out=out)
        with pytest.raises(backtrail.BacktrailError, match=f"{survived} of {run.steps} shards"):
            backtrail.open_influence(out)
        np.testing.assert_array_equal(
            method.attribute(run, standard_queries(), observed_at=states, out=out).values(), whole
        )


@each_method
def test_another_question_in_the_same_folder_is_refused(method: Method, tmp_path: Path) -> None:
    """A folder with other settings is refused; the message names them."""
    run = recorded_run("adamw", tmp_path)
    method.attribute(run, standard_queries(), out=tmp_path / "out")
    with pytest.raises(backtrail.BacktrailError, match="observed_at"):
        method.attribute(run, standard_queries(), observed_at=2, out=tmp_path / "out")
    other = next(made for made in METHODS.values() if made is not method)
    with pytest.raises(backtrail.BacktrailError, match="another influence"):
        other.attribute(run, standard_queries(), out=tmp_path / "out")


@each_method
def test_states_that_are_not_there_are_refused(method: Method, tmp_path: Path) -> None:
    """A state that the run does not have is refused."""
    with pytest.raises(NoSuchState, match="state 6: the run has states 0 to 5"):
        method.attribute(recorded_run("sgd", tmp_path), standard_queries(), observed_at=[2, 6])


@each_method
def test_the_model_at_hand_and_the_generators_are_left_alone(
    method: Method, tmp_path: Path
) -> None:
    """Weights, modes of modules and random state are unchanged."""
    run = recorded_run("batchnorm, adamw", tmp_path)
    model = run.task.model
    drawn = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    method.attribute(run, standard_queries())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
