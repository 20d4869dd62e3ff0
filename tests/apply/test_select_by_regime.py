"""Data selection by regime: its weights, and the losses of trainings with them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import backtrail
from backtrail.apply.select_by_regime import learning_rates, of_regimes
from backtrail.errors import BadSetting, ImpossibleWindow, NoRegimes, OtherRun
from backtrail.influence.analysis.regimes import example
from tests.cases import CASES_BY_NAME
from tests.oracles.nudge import observe
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_losses, standard_queries


def test_regimes_divide_by_the_learning_rate_of_the_run(tmp_path: Path) -> None:
    """A step's value is slots * mean of |influence| / learning rate."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    found = backtrail.regimes(run, influence)
    for place, step in enumerate(found.step.tolist()):
        sizes = np.abs(influence.values()[:, 0, step, : len(run.step(step).samples)])
        expected = len(run.step(step).samples) * sizes.mean() / 0.3
        assert found.value[place] == pytest.approx(expected)


def test_groups_of_parameters_count_by_their_size(tmp_path: Path) -> None:
    """The learning rate of a step is its mean over all entries of the parameters."""
    run = recorded_run("two groups", tmp_path)
    weights, biases = (
        sum(run.task.parameters()[name].numel() for name in group) for group in run.manifest.groups
    )
    rates = [settings["lr"] for settings in run.step(0).settings]
    assert rates == [0.01, 0.02]
    expected = (weights * 0.01 + biases * 0.02) / (weights + biases)
    np.testing.assert_allclose(learning_rates(run.manifest, run.log), [expected] * run.steps)


def test_selecting_is_training_without_the_harmful_slots(tmp_path: Path) -> None:
    """The losses are those of the plain loop without at most half of each batch, if harmful."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    scores = influence.values()[:, -1].mean(axis=0)
    ranges = {"always": [(0, run.steps)], "last two": [(run.steps - 2, run.steps)]}
    table = backtrail.worth_selecting(run, influence, standard_queries(), ranges=ranges, drop=0.5)

    def weights(first: int, step: int) -> Tensor:
        size = len(run.step(step).samples)
        row = scores[step, :size]
        harmful = [
            int(slot) for slot in np.argsort(row)[: size // 2] if row[slot] < 0 and step >= first
        ]
        found = torch.full((size,), size / (size - len(harmful)), dtype=torch.float64)
        found[harmful] = 0.0
        return found

    expected = [
        observe(
            CASES_BY_NAME["momentum"], standard_losses, [run.steps], partial(weights, first)
        ).mean()
        for first in (run.steps, 0, run.steps - 2)
    ]
    np.testing.assert_allclose(table["loss"], expected, rtol=1e-10)
    np.testing.assert_allclose(table["change"], np.array(expected) - expected[0], atol=1e-12)
    assert table["range"].to_list() == ["never", "always", "last two"]
    assert table["share"].to_list() == [0.0, 1.0, pytest.approx(2 / run.steps)]
    dropped = [
        sum(int((weights(first, step) == 0).sum()) for step in range(run.steps))
        for first in (0, run.steps - 2)
    ]
    assert table["dropped"].to_list() == [0, *dropped]
    assert table["change"][1] < 0


def test_drawn_at_random_are_as_many(tmp_path: Path) -> None:
    """The random control depends on the seed, and nothing else does."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    ranges = {"always": [(0, run.steps)]}
    first, second = (
        backtrail.worth_selecting(
            run, influence, standard_queries(), ranges=ranges, drop=0.5, seed=seed
        )
        for seed in (0, 1)
    )
    assert first.drop("random").equals(second.drop("random"))
    assert first["random"][1] != second["random"][1]


def test_ranges_are_those_of_the_regimes() -> None:
    """The ranges are those of the three regimes and of combinations."""
    found = example()
    both = {"always": [(0, 2), (2, 9), (9, 12)], "start + end": [(0, 2), (9, 12)]}
    assert of_regimes(found) == {**both, "start": [(0, 2)], "basin": [(2, 9)], "end": [(9, 12)]}


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """Other runs, invalid shares and ranges, and a run without regimes are refused."""
    run = recorded_run("sgd", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    with pytest.raises(OtherRun):
        backtrail.regimes(recorded_run("sgd", tmp_path / "again"), influence)
    with pytest.raises(BadSetting, match="drop"):
        backtrail.worth_selecting(run, influence, standard_queries(), drop=1.0)
    with pytest.raises(BadSetting, match="ranges"):
        backtrail.worth_selecting(run, influence, standard_queries(), ranges={})
    with pytest.raises(ImpossibleWindow):
        backtrail.worth_selecting(
            run, influence, standard_queries(), ranges={"too long": [(0, run.steps + 1)]}
        )
    flat = replace(example(), levels=(1.0, 1.0, 1.0))
    with pytest.raises(NoRegimes, match="No three regimes"):
        of_regimes(flat)
