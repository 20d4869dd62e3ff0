"""Training again on parts of the data against the plain loop."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply.coreset_report import Samples
from backtrail.errors import BadSetting, UnknownSample
from tests.cases import BATCHES, CASES_BY_NAME, Case
from tests.oracles.nudge import observe
from tests.recorded_runs import recorded_run
from tests.standard_queries import HELD_OUT, standard_losses, standard_queries

JUDGE = backtrail.Loss(HELD_OUT)


def kept_alone(case: Case, part: list[int]) -> np.ndarray:
    """Train by the plain loop on a part, whose samples share every step's weight."""

    def weights(step: int) -> Tensor:
        inside = torch.tensor(
            [row in part for batch in case.groups[step] for row in batch], dtype=torch.float64
        )
        return inside * len(inside) / inside.sum().clamp(min=1)

    return observe(case, standard_losses, [len(case.groups)], weights)[:, 0]


@pytest.mark.parametrize(
    "name", ["momentum", "adamw", "penalty", "clip norm", "clip norm, adamw", "batchnorm, sgd"]
)
def test_losses_are_those_of_training_on_the_part(name: str, tmp_path: Path) -> None:
    """The losses are those of the plain loop, also where a step has no sample of the part."""
    run = recorded_run(name, tmp_path)
    parts = {"first": [0, 2, 3, 5, 6], "few": [5]}
    assert sum(5 in batch for batch in BATCHES) == 1
    table = backtrail.compare_coresets(run, parts, standard_queries(), draws=0)
    expected = [
        kept_alone(CASES_BY_NAME[name], part).mean() for part in (list(range(9)), *parts.values())
    ]
    np.testing.assert_allclose(table["loss"], expected, rtol=1e-9)
    np.testing.assert_allclose(table["change"], np.array(expected) - expected[0], atol=1e-12)
    assert table["name"].to_list() == ["everything", "first", "few"]
    assert table["kept"].to_list() == [9, 5, 1]
    assert table.columns == ["name", "kept", "loss", "change"]


def test_it_agrees_with_retraining_without_the_others(tmp_path: Path) -> None:
    """A part's change is that of removing the others with a renormalised denominator."""
    run = recorded_run("momentum", tmp_path)
    part = [0, 1, 3, 4, 6, 8]
    table = backtrail.compare_coresets(run, {"part": part}, standard_queries(), draws=0)
    removed = backtrail.retrain(run, standard_queries(), [[2, 5, 7]], denominator="renormalize")
    np.testing.assert_allclose(table["change"][1], removed.change.mean(), rtol=1e-9)


def test_accuracy_is_the_share_of_rows_classified_rightly(tmp_path: Path) -> None:
    """The accuracy of every training is the share of rows classified correctly."""
    run = recorded_run("momentum", tmp_path)
    table = backtrail.compare_coresets(run, {"part": [0, 1, 2]}, JUDGE)
    params = run.state(run.steps).params
    outputs = torch.func.functional_call(run.task.model, params, (HELD_OUT.tensors[0],))
    assert table["accuracy"][0] == pytest.approx(
        float((outputs.argmax(1) == HELD_OUT.tensors[1]).double().mean())
    )
    losses = nn.functional.cross_entropy(outputs, HELD_OUT.tensors[1])
    assert table["loss"][0] == pytest.approx(float(losses), rel=1e-9)
    assert (4 * table["accuracy"][1]) % 1 == 0
    mean = backtrail.compare_coresets(
        run, {"part": [0, 1, 2]}, backtrail.Loss(HELD_OUT, aggregate="mean")
    )
    assert mean.equals(table)


def test_random_parts_of_the_same_sizes_ride_along(tmp_path: Path) -> None:
    """Each size has a row with the mean of random parts, which depend on the seed."""
    run = recorded_run("momentum", tmp_path)
    parts = {"a": [0, 1, 2], "b": [3, 4, 5], "c": [0, 1, 2, 3]}
    first, second = (
        backtrail.compare_coresets(run, parts, JUDGE, draws=2, seed=seed) for seed in (0, 1)
    )
    assert first["name"].to_list() == ["everything", "a", "b", "c", "random 3", "random 4"]
    assert first["kept"].to_list() == [9, 3, 3, 4, 3, 4]
    assert first[:4].equals(second[:4])
    assert first["loss"][4] != second["loss"][4]
    draw = np.random.default_rng(0)
    drawn = [draw.choice(9, 3, replace=False).tolist() for _ in range(2)]
    alone = backtrail.compare_coresets(run, {str(part): part for part in drawn}, JUDGE, draws=0)[
        "loss"
    ][1:]
    assert first["loss"][4] == pytest.approx(alone.mean())


def test_everything_changes_nothing(tmp_path: Path) -> None:
    """All samples, in any form and even twice, change nothing."""
    run = recorded_run("adamw", tmp_path)
    everything = pl.DataFrame({"sample": range(9)})
    forms: dict[str, Samples] = {
        "list": [*range(9), 3],
        "array": np.arange(9),
        "column": everything["sample"],
        "table": everything,
    }
    table = backtrail.compare_coresets(run, forms, JUDGE)
    np.testing.assert_allclose(table["change"], 0.0, atol=1e-13)
    assert set(table["kept"]) == {9}


def test_numbers_have_losses_and_no_accuracy(tmp_path: Path) -> None:
    """A regression has losses and no accuracy."""
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 2, generator=draw), torch.randn(12, 1, generator=draw))
    model = nn.Linear(2, 1)
    task = backtrail.regression(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(
        tmp_path / "run", task, optimizer, checkpoints=backtrail.Every(2)
    ) as recorder:
        for inputs, targets in recorder.watch(DataLoader(data, 4)):
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    table = backtrail.compare_coresets(run, {"half": list(range(0, 12, 2))}, backtrail.Loss(data))
    assert table.columns == ["name", "kept", "loss", "change"]
    assert table["loss"].is_finite().all()


def test_samples_that_no_batch_held_are_not_counted(tmp_path: Path) -> None:
    """Samples that are in no batch do not count, and a part of them alone is refused."""
    run = recorded_run("twice in a batch", tmp_path)
    assert 8 not in run.seen
    table = backtrail.compare_coresets(run, {"part": [0, 1, 8]}, standard_queries(), draws=1)
    assert dict(table.select("name", "kept").iter_rows()) == {
        "everything": len(run.seen),
        "part": 2,
        "random 2": 2,
    }
    with pytest.raises(BadSetting, match="in a recorded batch"):
        backtrail.compare_coresets(run, {"part": [8]}, standard_queries())


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """No parts, empty parts, unknown samples and negative draws are refused."""
    run = recorded_run("sgd", tmp_path)
    with pytest.raises(BadSetting, match="at least one part"):
        backtrail.compare_coresets(run, {}, JUDGE)
    with pytest.raises(BadSetting, match="nothing"):
        backtrail.compare_coresets(run, {"nothing": []}, JUDGE)
    with pytest.raises(UnknownSample, match="9"):
        backtrail.compare_coresets(run, {"part": [1, 9]}, JUDGE)
    with pytest.raises(BadSetting, match="by their numbers"):
        backtrail.compare_coresets(run, {"mask": pl.Series([True, False, True])}, JUDGE)
    with pytest.raises(BadSetting, match="draws"):
        backtrail.compare_coresets(run, {"part": [1]}, JUDGE, draws=-1)
