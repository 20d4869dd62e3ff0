"""The trust statement passes for exact influence, and says what is wrong with others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import backtrail
from backtrail.apply.trust import RemovalCheck, draw_visited, steadiest
from backtrail.errors import OtherRun, WithoutQueries
from backtrail.influence.writer import from_arrays
from backtrail.stats import Interval
from bench.models import digits, mlp
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

MANY = tuple(range(32))  # samples left out, where a test sets the figures of a check itself


def of_many(removal: RemovalCheck, **figures: Any) -> RemovalCheck:
    """The check of as many removals as correlations need, with some figures changed."""
    effects = np.zeros((len(removal.actual), len(MANY)))
    return replace(removal, samples=MANY, actual=effects, predicted=effects, **figures)


def test_an_exact_influence_passes_all_three_checks(tmp_path: Path) -> None:
    """Exact influence passes all three checks, and the text says so."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries(), observed_at="epochs")
    trust = backtrail.trust(run, influence, removals=8)
    assert trust.derivative is not None
    assert trust.derivative.error <= 1e-6
    assert trust.removal.pearson.estimate >= 0.9
    assert trust.removal.noise <= 1e-14
    assert [line.split()[1] for line in str(trust).splitlines()[:3]] == ["passed:"] * 3


def test_a_wrong_influence_fails_the_derivative_check(tmp_path: Path) -> None:
    """Influence of twice the size fails the derivative check, and has half the slope."""
    run = recorded_run("momentum", tmp_path)
    right = backtrail.DIT().attribute(run, standard_queries())
    wrong = from_arrays(right.description, 2 * right.values(), sample=right.sample).with_queries(
        standard_queries()
    )
    trust = backtrail.trust(run, wrong, removals=8)
    assert trust.derivative is not None
    assert not trust.derivative.passed
    assert trust.removal.slope == pytest.approx(
        backtrail.trust(run, right, removals=8).removal.slope / 2
    )
    assert "not the derivative" in str(trust)


def test_an_influence_from_disk_needs_its_queries(tmp_path: Path) -> None:
    """Influence from disk needs its own queries to be checked."""
    run = recorded_run("sgd", tmp_path)
    backtrail.DIT().attribute(run, standard_queries(), out=tmp_path / "dit")
    influence = backtrail.open_influence(tmp_path / "dit")
    with pytest.raises(WithoutQueries, match="row 0"):
        backtrail.trust(run, influence)
    with pytest.raises(WithoutQueries):
        backtrail.trust(run, influence, queries=backtrail.Custom(lambda m: m[0].weight.sum()))
    assert (
        backtrail.trust(run, influence, queries=standard_queries(), removals=4).derivative
        is not None
    )


def test_an_influence_of_another_run_is_refused(tmp_path: Path) -> None:
    """Influence of another run is refused, even of the same training."""
    influence = backtrail.DIT().attribute(recorded_run("sgd", tmp_path), standard_queries())
    with pytest.raises(OtherRun, match="belongs to the run with id"):
        backtrail.trust(recorded_run("sgd", tmp_path / "again"), influence)


def test_a_derivative_that_hangs_on_step_0_is_named(tmp_path: Path) -> None:
    """The advice differs where most influence comes from step 0."""
    run = recorded_run("momentum", tmp_path)
    trust = backtrail.trust(run, backtrail.DIT().attribute(run, standard_queries()), removals=8)
    failed = of_many(trust.removal, pearson=Interval(0.2, 0.0, 0.5))
    assert "step 0" in replace(trust, removal=failed, early=0.8).advice
    assert "not smooth" in replace(trust, removal=failed, early=0.1).advice


def test_what_an_additive_score_can_reach_is_measured(tmp_path: Path) -> None:
    """The best that an additive score can reach is measured by doubling each sample."""
    run = recorded_run("momentum", tmp_path)
    trust = backtrail.trust(run, backtrail.DIT().attribute(run, standard_queries()), removals=8)
    removal = trust.removal
    alone = [
        backtrail.retrain(run, standard_queries(), [[sample]], weight=2.0).change[:, 0, 0]
        for sample in removal.samples
    ]
    odd = (removal.actual - np.stack(alone, axis=1)) / 2
    expected = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(odd, removal.actual, strict=True)])
    assert removal.reachable == pytest.approx(expected)
    poor = of_many(removal, pearson=Interval(0.5, 0.3, 0.7), reachable=0.9)
    assert str(poor).endswith("; best Pearson any additive score can reach: 0.90")
    assert 'DIT(curvature="auto")' in replace(trust, removal=poor, early=0.0).advice
    spent = replace(poor, reachable=0.53)
    assert "No additive score does much better" in replace(trust, removal=spent, early=0.0).advice


def test_too_few_removals_decide_nothing(tmp_path: Path) -> None:
    """With a few removals the report says that they are too few, and gives no ceiling."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    for count in (1, 2, 4):
        trust = backtrail.trust(run, influence, removals=count)
        assert "too few for a reliable correlation" in str(trust.removal)
        assert "additive score" not in str(trust)
        assert f"Too few samples were left out ({count})" in str(trust)
        # Neither a good correlation nor a poor one is a result.
        for pearson in (Interval(1.0, 1.0, 1.0), Interval(0.1, -1.0, 1.0)):
            removal = replace(trust.removal, pearson=pearson, reachable=0.1)
            assert not removal.exhausted
            assert replace(trust, removal=removal).advice == trust.advice


def test_a_ceiling_below_the_measured_correlation_is_called_noisy(tmp_path: Path) -> None:
    """A ceiling that the influence exceeds is printed as an uncertain one; an equal one is not."""
    run = recorded_run("momentum", tmp_path)
    trust = backtrail.trust(run, backtrail.DIT().attribute(run, standard_queries()), removals=2)
    measured = Interval(0.874, 0.8, 0.9)
    removal = of_many(trust.removal, pearson=measured, reachable=0.81)
    assert str(removal).endswith("0.81 (lower than the measured one: both are noisy estimates)")
    assert str(replace(removal, reachable=0.871)).endswith("can reach: 0.87")
    assert "additive score" not in str(replace(removal, reachable=float("nan")))


def test_a_broken_recording_is_said_first(tmp_path: Path) -> None:
    """A run that does not replay is the first line of the statement."""
    run = recorded_run("sgd", tmp_path)
    influence = backtrail.DIT().attribute(run, standard_queries())
    run.task.data.tensors[0][8] += 1.0
    with pytest.raises(backtrail.BacktrailError, match="data set"):
        run.verify()
    assert "FAILED" in str(backtrail.trust(run, influence, removals=4)).splitlines()[0]


def test_renormalised_influence_is_checked_by_removals_alone(tmp_path: Path) -> None:
    """Renormalised influence is checked by removals, not as a derivative."""
    run = recorded_run("momentum", tmp_path)
    influence = backtrail.DIT(denominator="renormalize").attribute(run, standard_queries())
    trust = backtrail.trust(run, influence, removals=8)
    assert trust.derivative is None
    assert trust.removal.pearson.estimate >= 0.9
    assert trust.removal.reachable is None


def test_an_approximation_is_judged_by_removals_and_told_as_one(tmp_path: Path) -> None:
    """An approximate method is checked by removals, and the advice names the method."""
    run = recorded_run("adamw", tmp_path)
    for made in (backtrail.TracIn(), backtrail.GradientDot()):
        trust = backtrail.trust(run, made.attribute(run, standard_queries()), removals=8)
        assert trust.derivative is None
        assert "derivative" not in str(trust)
        many = of_many(trust.removal)
        sure = replace(many, pearson=Interval(0.95, 0.9, 0.99), slope=1.0)
        name = type(made).__name__
        assert replace(trust, removal=sure).advice == f"{name} predicts removals on this run."
        assert (
            "7 times the predicted ones" in replace(trust, removal=replace(sure, slope=7.0)).advice
        )
        poor = replace(many, pearson=Interval(0.2, 0.0, 0.5))
        advice = replace(trust, removal=poor, early=0.9).advice
        assert advice.startswith(f"{name} is a poor predictor")
        assert "backtrail.DIT()" in advice


def test_only_visited_samples_are_left_out(tmp_path: Path) -> None:
    """Only samples that the training has seen are left out."""
    run = recorded_run("twice in a batch", tmp_path)
    assert draw_visited(run, 100, seed=0) == (0, 1, 2, 3, 4)


def test_the_steadiest_pair_of_nudges_is_believed() -> None:
    """The difference quotient that changes least between sizes is used."""
    slopes = np.array([[[3.0, 1.0001, 1.0, 4.0]]])
    value, gap = steadiest(slopes)
    assert value[0, 0] == pytest.approx(1.0, abs=1e-4)
    assert gap[0, 0] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            lambda params: torch.optim.SGD(params, lr=0.03), id="sgd", marks=pytest.mark.slow
        ),
        pytest.param(lambda params: torch.optim.AdamW(params, lr=5e-4, eps=1e-6), id="adamw"),
    ],
)
def test_influence_predicts_leave_one_out_on_digits(optimizer: Any, tmp_path: Path) -> None:
    """On handwritten digits the Pearson correlation with removals is at least 0.99."""
    torch.manual_seed(0)
    model, (train, test) = mlp(), digits()
    task = backtrail.classification(model, train)
    moving = optimizer(model.parameters())
    loader = DataLoader(train, batch_size=50, shuffle=True)
    with backtrail.Recorder(tmp_path / "run", task, moving) as recorder:
        for _ in range(7):
            for batch in recorder.watch(loader):
                torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
                moving.step()
                moving.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    influence = backtrail.DIT().attribute(run, backtrail.Loss(test, aggregate="mean"))
    trust = backtrail.trust(run, influence, removals=24)
    assert trust.removal.pearson.estimate >= 0.99
    assert trust.derivative is not None
    assert trust.derivative.passed
