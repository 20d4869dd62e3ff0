"""Diff-In against dense Hessians in plain PyTorch and against leaving out, and its warnings."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vjp
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import NeverTrainedOn
from backtrail.methods.diff_in.diff_in import REACH
from backtrail.methods.diff_in.finite_differences import Differences, length
from backtrail.methods.diff_in.forms import Corrected
from backtrail.methods.diff_in.terms import Terms
from backtrail.methods.diff_in.trajectory import chosen_states, trajectory_of
from backtrail.task.task import in_eval_mode
from tests.cases import CASES_BY_NAME, CLASSES, FEATURES, SGD, rows
from tests.oracles.diff_in import Oracle
from tests.recorded_runs import recorded_run, recorded_sgd
from tests.standard_queries import standard_losses, standard_queries

ALL = range(9)


@pytest.mark.parametrize(
    "name", ["sgd", "two groups", "one cycle", "penalty", "batchnorm, sgd", "tied, sgd"]
)
def test_sums_equal_a_loop_with_dense_hessians(name: str, form: Any, tmp_path: Path) -> None:
    """Influence on queries, self-influence and the change by a removal are those of the oracle."""
    run = recorded_run(name, tmp_path)
    states = [2, 4, 5]
    oracle = Oracle(CASES_BY_NAME[name], states, ALL, 9, form)
    made = backtrail.DiffIn(states, form, chunk=4)
    truth = oracle.of_queries(standard_losses)
    found = made.attribute(run, standard_queries()).total()
    close(found[:, -1], truth.sum(1))
    close(made.self_influence(run, [0, 3, 7]), oracle.of_themselves([0, 3, 7]))
    change = made.parameter_change(run, [1, 4, 8])
    order = [name for name, _ in run.task.model.named_parameters()]
    close(torch.cat([change[name].flatten() for name in order]), oracle.of_removal([1, 4, 8]))


def close(found: Any, truth: Any, within: float = 1e-7) -> None:
    """Assert that two arrays differ by at most `within` times the largest entry."""
    found = np.asarray(found)
    truth = np.asarray(truth)
    np.testing.assert_allclose(found, truth, rtol=0, atol=within * np.abs(truth).max())


def test_a_proxy_batch_is_drawn_once_by_the_seed(form: Any, tmp_path: Path) -> None:
    """The same seed draws the same proxy batch of four samples, and another seed another."""
    run = recorded_run("sgd", tmp_path)
    made = [
        backtrail.DiffIn(1, form, batch=4, seed=seed).attribute(run, standard_queries()).total()
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.allclose(made[0], made[2])


def trained_network(dtype: torch.dtype, rows: int = 200) -> backtrail.Checkpoints:
    """Return the last checkpoint of a network of 6,661 parameters after 60 steps of SGD."""
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(rows, 20, dtype=dtype), torch.randint(0, 5, (rows,)))
    model = nn.Sequential(nn.Linear(20, 256), nn.GELU(), nn.Linear(256, 5)).to(dtype)
    optimizer = SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    task = backtrail.classification(model, data)
    return backtrail.Checkpoints(task, [(60, model.state_dict(), 0.2)], steps=60)


@pytest.mark.parametrize(
    ("dtype", "sides", "allowed"),
    [
        (torch.float64, "central", 1e-6),
        (torch.float32, "central", 1e-2),
        (torch.float64, "one-sided", 1e-2),
        (torch.float32, "one-sided", 1e-2),
    ],
)
def test_curvature_products_equal_autograd(dtype: torch.dtype, sides: Any, allowed: float) -> None:
    """Differences agree with autograd along gradients and random directions, long and short."""
    trajectory = trained_network(dtype).trajectory(1)
    terms = Terms.of(
        trajectory, Corrected(), Differences(sides=sides), batch=128, seed=0, chunk=None
    )
    model = terms._local_models()[0]
    at = trajectory.end.trained
    with in_eval_mode(trajectory.task):
        directions = model.gradients(model.rows.read([0, 1, 2, 3]))
        directions = {
            name: torch.cat(
                [
                    t,
                    torch.randn(4, *t.shape[1:], dtype=dtype) * torch.tensor(1e5).to(dtype),
                    1e-7 * t,
                ]
            )
            for name, t in directions.items()
        }
        found = model.curvature_product(directions)
        for row in range(12):
            (exact,) = vjp(model.proxy.gradient, at)[1](
                {name: t[row] for name, t in directions.items()}
            )
            gap = length({name: found[name][row] - exact[name] for name in exact})
            assert float(gap / length(exact)) <= allowed


def test_no_direction_has_no_derivative_and_a_huge_one_does_not_overflow() -> None:
    """A direction shorter than 1e-12 gives exactly zero, and one of length 1e30 is not squared."""
    at = {"x": torch.ones(3)}

    def half_square(tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": tree["x"] * 1.0}

    for sides in ("central", "one-sided"):
        differences = Differences(sides=sides)
        assert (differences(half_square, at, {"x": torch.full((3,), 1e-13)})["x"] == 0).all()
        assert (differences(half_square, at, {"x": torch.zeros(3)})["x"] == 0).all()
        huge = differences(half_square, at, {"x": torch.full((3,), 1e30)})["x"]
        np.testing.assert_allclose(huge, 1e30, rtol=1e-3)


@pytest.mark.parametrize(("sides", "allowed"), [("central", 1e-9), ("one-sided", 0.0)])
def test_differences_also_tell_the_value(sides: Any, allowed: float) -> None:
    """The value at the point comes with the differences, without a further evaluation."""
    at = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    slope, value = Differences(sides=sides).derivative_and_value(
        lambda tree: {"y": tree["x"] ** 3}, at, {"x": at["x"]}
    )
    assert abs(value["y"] - at["x"] ** 3).max() <= allowed
    assert abs(slope["y"] - 3 * at["x"] ** 3).max() <= (1e-8 if sides == "central" else 0.02)


def test_the_corrected_form_predicts_leaving_out_where_training_is_short(tmp_path: Path) -> None:
    """The corrected form predicts removals within 3 %; the published one has the opposite sign."""
    run = recorded_sgd(tmp_path, epochs=5, lr=0.005)
    truth = backtrail.leave_one_out(run, standard_queries(), samples=range(24))
    corrected = backtrail.DiffIn(5, "corrected").attribute(run, standard_queries())
    assert float(str(corrected.settings[REACH])) < 0.1
    assert "warning" not in corrected.settings
    published = backtrail.DiffIn(5, "published").attribute(run, standard_queries())
    for found, other, left_out in zip(
        corrected.total()[:, -1], published.total()[:, -1], truth, strict=True
    ):
        slope = (found @ left_out) / (found @ found)
        assert abs(slope - 1) <= 0.03
        assert np.corrcoef(found, left_out)[0, 1] >= 0.999
        assert np.corrcoef(other, left_out)[0, 1] < 0


def test_the_warning_comes_where_training_went_far(tmp_path: Path) -> None:
    """The warning is given where steps times rate times largest eigenvalue is not small."""
    run = recorded_sgd(tmp_path, lr=0.3)
    found = backtrail.DiffIn(2, "corrected").attribute(run, standard_queries())
    assert found.settings["warning"] == "unreliable"
    trajectory = trajectory_of(run, 2)
    terms = Terms.of(trajectory, Corrected(), Differences(), batch=512, seed=0, chunk=None)
    hessians = []
    for model in terms._local_models():
        size = sum(t.numel() for t in model.point.trained.values())
        eye = torch.eye(size, dtype=torch.float64)
        begin = 0
        unit = {}
        for name, tensor in model.point.trained.items():
            unit[name] = eye[:, begin : begin + tensor.numel()].reshape(size, *tensor.shape)
            begin += tensor.numel()
        with in_eval_mode(trajectory.task):
            hessians.append(
                torch.cat([t.flatten(1) for t in model.curvature_product(unit).values()], 1)
            )
    largest = max(float(torch.linalg.matrix_norm(h, 2)) for h in hessians)
    assert found.settings[REACH] == pytest.approx(run.steps * 0.3 * largest, rel=0.05)


def test_a_few_directions_stand_for_all_curvature_between_gradients(
    form: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank near the number of samples is nearly exact, and rank 1 logs a warning."""
    run = recorded_sgd(tmp_path)
    exact = backtrail.DiffIn(1, form, rank=None).self_influence(run)
    close(backtrail.DiffIn(1, form, rank=11).self_influence(run), exact, within=0.03)
    assert "rank" not in caplog.text
    backtrail.DiffIn(1, form, rank=1).self_influence(run)
    assert "At state 16, curvature through rank=1 directions is off by" in caplog.text


def test_total_is_the_sum_for_a_removal_and_grows_with_the_states(
    form: Any, tmp_path: Path
) -> None:
    """The term of every state is spread over the visits in the steps that it represents."""
    run = recorded_sgd(tmp_path)
    made = backtrail.DiffIn(4, form)
    assert chosen_states(run, 4) == [4, 8, 12, 16]
    influence = made.attribute(run, standard_queries())
    assert influence.observed_at == (4, 8, 12, 16)
    parts = [
        backtrail.DiffIn([state], form).attribute(run, standard_queries()).total()[:, 0] / 4
        for state in (4, 8, 12, 16)
    ]
    np.testing.assert_allclose(influence.total()[:, -1], sum(parts), rtol=1e-6, atol=1e-12)
    seen = [influence.visits(start, start + 4) for start in (0, 4, 8, 12)]
    for visits, part in zip(seen, parts, strict=True):
        np.testing.assert_allclose(visits, part, rtol=1e-6, atol=1e-12)
    if form == "published":
        np.testing.assert_allclose(
            influence.total(), np.cumsum(parts, 0).transpose(1, 0, 2), rtol=1e-6, atol=1e-12
        )


def test_a_query_is_the_pairing_with_the_change_of_the_parameters(tmp_path: Path) -> None:
    """Influence on a parameter, summed over samples, is the change of that parameter."""
    run = recorded_sgd(tmp_path)
    made = backtrail.DiffIn(3, "corrected")
    query = backtrail.Parameter("0.weight", [(0, 1), (3, 2)])
    influence = made.attribute(run, query).total()[:, -1]
    change = made.parameter_change(run, [2, 5, 11])["0.weight"]
    np.testing.assert_allclose(influence[:, [2, 5, 11]].sum(1), change[[0, 3], [1, 2]], rtol=1e-6)


def test_only_states_that_are_needed_are_replayed(tmp_path: Path) -> None:
    """Every segment is represented by its last stored state, or by its end if it has none."""
    assert chosen_states(recorded_run("sgd", tmp_path), 1) == [5]  # kept: 0, 2, 4, 5
    assert chosen_states(recorded_run("sgd", tmp_path / "two"), 2) == [2, 5]
    assert chosen_states(recorded_run("sgd", tmp_path / "many"), 8) == [1, 2, 3, 4, 5]


def test_rows_that_cannot_be_stacked_are_taken_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that vmap refuses gives the same numbers, and the log says how they were computed."""
    run = recorded_run("sgd", tmp_path)
    other = recorded_run("sgd", tmp_path / "other")
    plain = other.task.predict

    def predict(model: nn.Module, batch: Any) -> torch.Tensor:
        outputs: torch.Tensor = plain(model, batch)
        return outputs * 1.0 if float(outputs.detach().sum()) > 0 else outputs

    object.__setattr__(other.task, "predict", predict)
    made = backtrail.DiffIn(2)
    found, truth = (
        made.attribute(one, backtrail.Parameter("0.bias", [(0,)])).total() for one in (other, run)
    )
    np.testing.assert_allclose(found, truth, rtol=1e-9)
    assert "one by one" in caplog.text


def test_a_sample_never_visited_has_nothing(tmp_path: Path) -> None:
    """A sample that no batch held has no influence, and cannot be asked about by number."""
    run = recorded_run("twice in a batch", tmp_path)
    assert (backtrail.DiffIn(2).attribute(run, standard_queries()).total()[..., 5:] == 0).all()
    assert (backtrail.DiffIn(2).self_influence(run)[5:] == 0).all()
    with pytest.raises(NeverTrainedOn, match="Samples 5, 8 were never trained on"):
        backtrail.DiffIn(2).parameter_change(run, [5, 8])
    with pytest.raises(NeverTrainedOn, match="Sample 8 was never trained on"):
        backtrail.DiffIn(2).self_influence(run, [0, 8])


def test_a_rate_by_group_and_idle_parameters_count_as_used(tmp_path: Path) -> None:
    """A frozen layer is not changed by a removal; the other layers are."""
    run = recorded_run("frozen", tmp_path)
    change = backtrail.DiffIn(2, "corrected").parameter_change(run, [0])
    assert all((tensor == 0).all() for name, tensor in change.items() if name.startswith("0."))
    assert change["2.bias"].abs().max() > 0


def test_a_sum_over_the_batch_is_a_mean_with_a_larger_rate(tmp_path: Path) -> None:
    """Summed losses of three samples with a third of the rate give the same influence."""
    torch.manual_seed(7)
    found = []
    reductions: list[tuple[Literal["mean", "sum"], float]] = [("mean", 0.3), ("sum", 0.1)]
    for reduce, lr in reductions:
        model = CASES_BY_NAME["sgd"].built()
        data = rows()
        task = backtrail.classification(model, data, reduce=reduce)
        optimizer = SGD(model.parameters(), lr=lr)
        with backtrail.Recorder(tmp_path / reduce, task, optimizer) as recorder:
            for inputs, labels in recorder.watch(DataLoader(data, 3)):
                nn.functional.cross_entropy(model(inputs), labels, reduction=reduce).backward()
                optimizer.step()
                optimizer.zero_grad()
        run = backtrail.open_run(tmp_path / reduce, task)
        found.append(backtrail.DiffIn(2, "corrected").attribute(run, standard_queries()).total())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


WRONG = {
    "DiffIn(0)": "Invalid checkpoints=0: expected a positive number of states, or the numbers",
    "DiffIn([])": "Invalid checkpoints=[]: expected",
    "DiffIn([0, 4])": "Invalid checkpoints=[0, 4]: expected",
    "DiffIn(form='true')": "Invalid form='true': expected 'published' or 'corrected'",
    "DiffIn(sides='left')": "Invalid sides='left': expected 'central' or 'one-sided'",
    "DiffIn(batch=0)": "Invalid batch=0: expected a positive integer",
    "DiffIn(chunk=-1)": "Invalid chunk=-1: expected a positive integer",
    "DiffIn(rank=0)": "Invalid rank=0: expected a positive integer",
    "DiffIn(epsilon=0.0)": "Invalid epsilon=0.0: expected a positive number",
}


def test_settings_that_are_none_are_refused() -> None:
    """Invalid settings are refused when the method is made, in a process without shape checks."""
    code = (
        "import backtrail\n"
        "for made in {!r}:\n"
        " try: eval('backtrail.' + made)\n"
        " except backtrail.BacktrailError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(list(WRONG))], capture_output=True, text=True, check=True
    )
    for said, wanted in zip(done.stdout.splitlines(), WRONG.values(), strict=True):
        assert said.startswith(wanted)


def test_what_a_run_does_not_have_is_refused(tmp_path: Path) -> None:
    """States and samples that the run does not have are refused, and so are averaged weights."""
    run = recorded_run("sgd", tmp_path)
    with pytest.raises(backtrail.BacktrailError, match="no state 6: the run has states 0 to 5"):
        backtrail.DiffIn([2, 6]).attribute(run, standard_queries())
    with pytest.raises(backtrail.BacktrailError, match="9"):
        backtrail.DiffIn(1).self_influence(run, [9])
    with pytest.raises(backtrail.BacktrailError, match="9"):
        backtrail.DiffIn(1).parameter_change(run, [9])
    with pytest.raises(backtrail.BacktrailError, match=r"backtrail\.DIT supports averages"):
        backtrail.DiffIn(1).attribute(run, backtrail.Averaged(standard_queries(), decay=0.5))


def test_ids_are_refused(tmp_path: Path) -> None:
    """A run whose samples have ids is refused, as its rows cannot be read again by number."""
    model = nn.Linear(FEATURES, CLASSES).double()
    data = rows()
    inputs, labels = data.tensors
    told = TensorDataset(inputs, labels, torch.arange(9) + 100)
    task = backtrail.classification(model, told, ids=2)
    optimizer = SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(tmp_path / "run", task, optimizer, keep_batches=True) as recorder:
        for batch in recorder.watch(DataLoader(told, 3)):
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(backtrail.BacktrailError, match="the samples of this run are ids"):
        backtrail.DiffIn(1).attribute(
            backtrail.open_run(tmp_path / "run", task), standard_queries()
        )
