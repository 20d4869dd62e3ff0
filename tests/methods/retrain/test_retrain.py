"""Re-runs agree with trainings in plain PyTorch that leave out the sample's loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import backtrail
from backtrail.errors import BadSetting, ImpossibleWindow, NeverTrainedOn, UnknownSample
from backtrail.methods.memory import bytes_of_activations
from backtrail.methods.retrain import stacks
from backtrail.methods.retrain.retrain import retrain
from backtrail.sweep.rerun import gradients_one_by_one, rerun
from tests.cases import CASES_BY_NAME, Case, rows, train
from tests.oracles.nudge import observe
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_losses, standard_queries

CHOSEN = [
    "momentum",
    "adamw",
    "tied, adamw",
    "one cycle",
    "accumulation, batchnorm",
    "penalty",
    "clip norm",
    "twice in a batch",
    "batchnorm, skipped",
]


def without(case: Case, sample: int, steps: tuple[int, int], states: list[int]) -> np.ndarray:
    """Train by the plain loop with the sample's weight 0 at some steps; return the queries."""

    def weights(step: int) -> Tensor:
        slots = [row for batch in case.groups[step] for row in batch]
        inside = steps[0] <= step < steps[1]
        return torch.tensor(
            [0.0 if inside and row == sample else 1.0 for row in slots], dtype=torch.float64
        )

    return observe(case, standard_losses, states, weights)


@pytest.mark.parametrize("name", CHOSEN)
def test_leaving_out_equals_plain_training_without(name: str, tmp_path: Path) -> None:
    """Leaving out everywhere, in a window and at chosen steps equals the plain loop."""
    case = CASES_BY_NAME[name]
    run = recorded_run(name, tmp_path)
    last = run.steps
    samples = [0, 4]
    base = observe(case, standard_losses, [1, last])
    for place, sample in enumerate(samples):
        everywhere = without(case, sample, (0, last), [1, last]) - base
        late = without(case, sample, (1, last), [last])[:, 0] - base[:, 1]
        whole = backtrail.leave_one_out(run, standard_queries(), samples=samples)[:, place]
        window = backtrail.leave_one_out(
            run, standard_queries(), samples=samples, window=(1, last)
        )[:, place]
        steps = backtrail.leave_one_out(run, standard_queries(), samples=samples, steps=(1, last))[
            :, place
        ]
        np.testing.assert_allclose(whole, everywhere[:, 1], rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(
            window, everywhere[:, 1] - everywhere[:, 0], rtol=1e-9, atol=1e-13
        )
        np.testing.assert_allclose(steps, late, rtol=1e-9, atol=1e-13)


def test_a_window_from_the_start_is_leaving_out_until_there(tmp_path: Path) -> None:
    """A window from state 0 on is the change at its end, as no removal changes state 0."""
    run = recorded_run("adamw", tmp_path)
    window = backtrail.leave_one_out(run, standard_queries(), samples=[1, 3], window=(0, run.steps))
    np.testing.assert_array_equal(
        window, backtrail.leave_one_out(run, standard_queries(), samples=[1, 3])
    )
    assert (backtrail.leave_one_out(run, standard_queries(), samples=[1], window=(0, 0)) == 0).all()


def test_renormalising_shares_the_batch_among_the_others(tmp_path: Path) -> None:
    """The loss of every batch is the mean over the samples that are left."""
    case = CASES_BY_NAME["adamw"]
    run = recorded_run("adamw", tmp_path)

    def weights(step: int) -> Tensor:
        slots = case.batches[step]
        left = [row for row in slots if row != 3]
        return torch.tensor(
            [0.0 if row == 3 else len(slots) / len(left) for row in slots], dtype=torch.float64
        )

    truth = observe(case, standard_losses, [run.steps], weights) - observe(
        case, standard_losses, [run.steps]
    )
    found = backtrail.leave_one_out(run, standard_queries(), samples=[3], denominator="renormalize")
    np.testing.assert_allclose(found, truth, rtol=1e-9)


def test_stacks_of_any_size_agree_and_have_no_noise(tmp_path: Path) -> None:
    """Stacks of any size agree, and the unperturbed runs in each are equal."""
    run = recorded_run("adamw", tmp_path)
    groups = [[0], [1, 2], [8], [3, 4, 5]]
    whole = retrain(run, standard_queries(), groups, observed_at=[2, 5])
    parts = retrain(run, standard_queries(), groups, observed_at=[2, 5], batch=2)
    np.testing.assert_allclose(parts.change, whole.change, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        whole.base, observe(CASES_BY_NAME["adamw"], standard_losses, [2, 5]), rtol=1e-12
    )
    assert whole.noise.max() <= 1e-14


def test_large_activations_make_small_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between 8 and 64 runs share a stack, by the bytes of a step's activations."""
    run = recorded_run("sgd", tmp_path)
    kept = bytes_of_activations(run, twice=False)
    assert stacks.runs_at_once(run, None) == 64
    monkeypatch.setattr(stacks, "ACTIVATION_BYTES", 20 * kept)
    assert stacks.runs_at_once(run, torch.float64) == 20
    assert stacks.runs_at_once(run, torch.float32) == 40
    monkeypatch.setattr(stacks, "ACTIVATION_BYTES", kept)
    assert stacks.runs_at_once(run, None) == 8


def test_a_sample_never_seen_is_refused(tmp_path: Path) -> None:
    """A sample that no batch held cannot be left out, alone or in a group."""
    run = recorded_run("twice in a batch", tmp_path)
    with pytest.raises(NeverTrainedOn, match="Sample 8 was never trained on"):
        backtrail.leave_one_out(run, standard_queries(), samples=[8])
    with pytest.raises(NeverTrainedOn, match="Samples 5, 8 were never trained on"):
        backtrail.retrain(run, standard_queries(), [[0, 8], [5]])


def test_a_training_that_diverges_is_nan_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A re-run that ends in NaN has a change of NaN; the others keep theirs."""
    run = recorded_run("sgd", tmp_path)
    found = backtrail.retrain(run, standard_queries(), [[0], [1]], weight=1e300)
    assert np.isnan(found.change).all()
    assert found.diverged == (0, 1)
    assert "NaN after removal 0, 1" in repr(found)
    assert "2 of 2 trainings without samples end with a query that is NaN" in caplog.text
    plain = backtrail.retrain(run, standard_queries(), [[0], [1]])
    assert plain.diverged == ()
    np.testing.assert_array_equal(found.base, plain.base)


def test_a_query_that_is_nan_has_no_change(tmp_path: Path) -> None:
    """Where the query itself is NaN, so is its change, and that of the other query is not."""
    run = recorded_run("sgd", tmp_path)

    def read(model: torch.nn.Module) -> Tensor:
        first = next(model.parameters()).sum()
        return torch.stack([first, first * torch.nan])

    found = backtrail.retrain(run, backtrail.Custom(read, labels=["sum", "nan"]), [[0]])
    assert np.isfinite(found.change[0]).all()
    assert np.isnan(found.change[1]).all()
    assert np.isnan(found.base[1]).all()


def test_states_before_the_removal_have_a_base_and_no_change(tmp_path: Path) -> None:
    """At a state before the first changed step the query is as it was recorded."""
    run = recorded_run("sgd", tmp_path)
    last = run.steps - 1
    sample = run.log[last].samples[0]
    found = backtrail.retrain(
        run, standard_queries(), [[sample]], steps=(last, run.steps), observed_at=[1, run.steps]
    )
    everywhere = backtrail.retrain(
        run, standard_queries(), [[run.log[0].samples[0]]], observed_at=[1, run.steps]
    )
    assert (found.change[:, 0] == 0).all()
    np.testing.assert_allclose(found.base, everywhere.base, rtol=1e-12)


def test_models_that_cannot_be_stacked_are_run_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that vmap refuses gives the same changes, and the log says how they were computed."""
    run = recorded_run("batchnorm, adamw", tmp_path)
    branching = recorded_run("batchnorm, adamw", tmp_path / "other")
    plain = branching.task.predict

    def predict(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs: Tensor = plain(model, batch)
        return outputs * 1.0 if float(outputs.detach().sum()) > 0 else outputs

    object.__setattr__(branching.task, "predict", predict)
    found = backtrail.leave_one_out(branching, standard_queries(), samples=[0, 5])
    np.testing.assert_allclose(
        found,
        backtrail.leave_one_out(run, standard_queries(), samples=[0, 5]),
        rtol=1e-9,
        atol=1e-13,
    )
    assert "re-running one by one" in caplog.text


def test_one_by_one_equals_stacked(tmp_path: Path) -> None:
    """Every run of a stack is the run that it would be alone."""
    run = recorded_run("clip norm", tmp_path)
    weights = torch.rand(3, 3, dtype=torch.float64)
    stacked = dict(
        rerun(run.transition, run.state(0).repeat(3), lambda _: weights, start=0, stop=2)
    )[2]
    alone = run.state(0).repeat(3)
    for index in range(2):
        step = run.transition(index)
        alone = step.apply_update_to_stack(alone, *gradients_one_by_one(step, alone, weights))
    for name, tensor in stacked.params.items():
        torch.testing.assert_close(tensor, alone.params[name], rtol=1e-12, atol=1e-14)


def test_impossible_removals_are_refused(tmp_path: Path) -> None:
    """Unknown samples, windows and settings are refused; the message gives the values."""
    run = recorded_run("sgd", tmp_path)
    with pytest.raises(UnknownSample, match="no sample 9: the training set has 9 rows"):
        backtrail.leave_one_out(run, standard_queries(), samples=[2, 9])
    with pytest.raises(ImpossibleWindow, match="7"):
        backtrail.leave_one_out(run, standard_queries(), samples=[2], window=(1, 7))
    with pytest.raises(ImpossibleWindow, match=r"step range \(0, 6\): expected .* <= 5"):
        retrain(run, standard_queries(), [[2]], steps=(0, 6))
    with pytest.raises(BadSetting, match="batch=0: expected a positive integer or None"):
        retrain(run, standard_queries(), [[2]], batch=0)
    with pytest.raises(TypeError, match="weigth"):
        backtrail.leave_one_out(run, standard_queries(), samples=[2], weigth=2)  # type: ignore[call-arg]


def test_the_plain_loop_is_what_was_recorded(tmp_path: Path) -> None:
    """The plain loop ends at the recorded weights, bit for bit."""
    case = CASES_BY_NAME["two groups"]
    run = recorded_run("two groups", tmp_path)
    data = rows()
    model = case.built()
    for _ in train(case, model, data):
        pass
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            run.state(run.steps).params[name], parameter.detach(), rtol=0, atol=0
        )


def test_a_sample_may_keep_a_weight_or_be_counted_twice(tmp_path: Path) -> None:
    """Near weight 1 the change is linear in the weight, on both sides."""
    run = recorded_run("momentum", tmp_path)
    more, less = (
        backtrail.retrain(run, standard_queries(), [[2]], weight=weight).change
        for weight in (1 + 1e-5, 1 - 1e-5)
    )
    np.testing.assert_allclose(more, -less, rtol=1e-3)
    total = backtrail.DIT().attribute(run, standard_queries()).total()[:, :, [2]]
    np.testing.assert_allclose(less / 1e-5, total, rtol=1e-3)
