"""Re-runs without folds of the samples against the plain loop with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backtrail.apply import cross_validation as held_out
from backtrail.apply.cross_validation import cross, parted
from backtrail.errors import BadSetting
from tests.cases import CASES_BY_NAME, CLASSES, Case, rows, train
from tests.recorded_runs import recorded_regression, recorded_run
from tests.streams import recorded_stream

NAMES = [
    "sgd",
    "adamw",
    "batchnorm, sgd",
    "short batches",
    "twice in a batch",
    "accumulation, adamw",
    "penalty",
]


def retrained(case: Case, without: np.ndarray, states: list[int]) -> np.ndarray:
    """Train by the plain loop without some; return probabilities `[state, sample, label]`."""
    model = case.built()
    data = rows()

    def weights(step: int) -> Tensor:
        samples = [sample for batch in case.groups[step] for sample in batch]
        stay = [0.0 if without[sample] else 1.0 for sample in samples]
        return torch.tensor(
            [len(samples) / max(sum(stay), 1) * one for one in stay], dtype=torch.float64
        )

    found = []
    for state in train(case, model, data, weights):
        if state in states:
            with torch.no_grad():
                found.append(model.eval()(data.tensors[0]).softmax(1).numpy())
            model.train()
    return np.array(found)


@pytest.mark.parametrize("name", NAMES)
def test_readings_are_those_of_plain_trainings(name: str, tmp_path: Path) -> None:
    """Distances and probabilities are the means over plain trainings."""
    run = recorded_run(name, tmp_path)
    states = [2, len(CASES_BY_NAME[name].groups)]
    found = cross(run, states, folds=3, repeats=2, seed=4)
    left_out = parted(run.samples, folds=3, repeats=2, seed=4)
    again = np.array([retrained(CASES_BY_NAME[name], without, states) for without in left_out])
    given = rows().tensors[1].numpy()
    for sample in range(run.samples):
        label = [float(place == given[sample]) for place in range(CLASSES)]
        gaps = np.sqrt(((again[:, :, sample] - label) ** 2).sum(-1))
        out = left_out[:, sample]
        assert found.out[sample] == pytest.approx(gaps[out].mean(), rel=1e-9)
        assert found.inside[sample] == pytest.approx(gaps[~out].mean(), rel=1e-9)
        assert found.chances is not None
        np.testing.assert_allclose(
            found.chances[sample], again[out, :, sample].mean((0, 1)), rtol=1e-9
        )


def test_few_at_a_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller stacks give the same distances."""
    run = recorded_run("adamw", tmp_path)
    together = cross(run, [run.steps], folds=3, repeats=2)
    monkeypatch.setattr(held_out, "ROOM", 1)
    np.testing.assert_allclose(
        cross(run, [run.steps], folds=3, repeats=2).out, together.out, rtol=1e-12
    )


def test_every_sample_is_left_out_once_a_cut() -> None:
    """Folds are disjoint and of nearly equal size, and repeats differ."""
    parts = parted(11, folds=3, repeats=2, seed=0)
    assert parts.shape == (6, 11)
    assert (parts[:3].sum(axis=0) == 1).all()
    assert sorted(parts[3:].sum(axis=1)) == [3, 4, 4]
    assert (parts[:3] != parts[3:]).any()


def test_sums_are_not_shared_out(tmp_path: Path) -> None:
    """With a summed loss a sample that is left out is not replaced by more weight of others."""
    run = recorded_regression(tmp_path / "run")
    object.__setattr__(run.task, "reduce", "sum")
    shared = cross(run, [run.steps], folds=2, repeats=1)
    inputs, targets = run.task.data.tensors
    left_out = parted(6, folds=2, repeats=1, seed=0)
    expected = np.zeros(6)
    for without in left_out:
        params = run.state(0).params
        for step in run.log:
            batch = [sample for sample in step.samples if not without[sample]]
            params = {name: tensor.requires_grad_() for name, tensor in params.items()}
            gaps = inputs[batch] @ params["weight"].T + params["bias"] - targets[batch]
            slopes = torch.autograd.grad(gaps.square().sum(), list(params.values()))
            params = {
                name: (p - 0.1 * g).detach()
                for (name, p), g in zip(params.items(), slopes, strict=True)
            }
        losses = (inputs @ params["weight"].T + params["bias"] - targets).square()[:, 0]
        expected[without] = losses.detach().numpy()[without]
    np.testing.assert_allclose(shared.out, expected, rtol=1e-5)
    assert shared.chances is None


def test_samples_with_ids_are_left_out_by_id(tmp_path: Path) -> None:
    """Left out by id, a sample is mostly farther from its own label."""
    run = recorded_stream(tmp_path / "run", epochs=20)
    found = cross(run, [run.steps], folds=4, repeats=2)
    assert (found.out > found.inside).mean() > 0.6


def test_impossible_parts_are_refused(tmp_path: Path) -> None:
    """One fold, more folds than samples and no repeats are refused."""
    run = recorded_run("sgd", tmp_path)
    for folds in (1, run.samples + 1):
        with pytest.raises(BadSetting, match=f"folds={folds}"):
            cross(run, [run.steps], folds=folds)
    with pytest.raises(BadSetting, match="repeats=0"):
        cross(run, [run.steps], repeats=0)
