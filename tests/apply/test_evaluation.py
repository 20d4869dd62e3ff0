"""The evaluation of scores by removals, and by samples known to be wrong."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import backtrail
from backtrail import stats
from backtrail.errors import BadSetting, NotObserved, OtherRun, WithoutQueries
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries


def estimate(table: pl.DataFrame, method: str, measure: str) -> float:
    """Return one estimate of the table."""
    (found,) = table.filter(pl.col("method") == method, pl.col("measure").str.starts_with(measure))[
        "estimate"
    ]
    return float(found)


def test_methods_are_judged_on_the_same_removals(tmp_path: Path) -> None:
    """Exact influence predicts removals, and its negative predicts the opposite."""
    run = recorded_run("momentum", tmp_path)
    bank = tmp_path / "bank"
    found = backtrail.DIT().attribute(run, standard_queries())
    scores: dict[str, backtrail.Influence | np.ndarray] = {
        "exact": found,
        "negative": -found.total()[:, -1].astype(np.float64),
    }
    table = backtrail.evaluate(run, scores, removals=8, shares=(0.2, 0.5), groups=6, bank=bank)
    assert table["method"].unique().sort().to_list() == ["exact", "negative"]
    assert estimate(table, "exact", "Pearson") >= 0.9
    assert estimate(table, "negative", "Pearson") == pytest.approx(
        -estimate(table, "exact", "Pearson")
    )
    assert table.filter(pl.col("measure") == "Pearson")["reruns"].to_list() == [8, 8]
    assert table.filter(pl.col("measure").str.starts_with("LDS"))["removed"].unique().to_list() == [
        round(0.2 * run.samples),
        round(0.5 * run.samples),
    ]
    assert (table["low"] <= table["estimate"] + 1e-12).all()
    assert (table["high"] >= table["estimate"] - 1e-12).all()
    assert len(list(bank.iterdir())) == 3


def test_the_score_of_groups_is_the_linear_datamodelling_score(tmp_path: Path) -> None:
    """The score of groups is that of `stats.lds` on the same removals."""
    run = recorded_run("adamw", tmp_path)
    found = backtrail.DIT().attribute(run, standard_queries())
    table = backtrail.evaluate(run, found, removals=0, shares=(0.3,), groups=5, seed=7)
    size = round(0.3 * run.samples)
    draw = np.random.default_rng((7, size))
    groups = [np.sort(draw.choice(run.ids, size, replace=False)) for _ in range(5)]
    actual = backtrail.retrain(
        run, standard_queries(), [group.tolist() for group in groups]
    ).change[:, 0]
    expected = stats.mean_over_queries(stats.lds(found.total()[:, -1], groups, actual))
    assert estimate(table, "DIT", "LDS") == pytest.approx(expected)


def test_samples_known_to_be_wrong_are_looked_for(tmp_path: Path) -> None:
    """Scores that are lowest for the wrong samples have measures of 1, without re-runs."""
    run = recorded_run("momentum", tmp_path)
    wrong = [1, 4]
    scores = np.ones((len(standard_queries().names), run.samples))
    scores[:, wrong] = -1.0
    table = backtrail.evaluate(
        run, {"told": scores}, standard_queries(), wrong=wrong, removals=0, shares=()
    )
    assert dict(zip(table["measure"], table["estimate"], strict=True)) == {
        "AUC": 1.0,
        "average precision": 1.0,
        "precision": 1.0,
    }
    assert table["reruns"].to_list() == [0, 0, 0]


def test_an_effort_that_is_none_is_refused(tmp_path: Path) -> None:
    """Unknown options, invalid shares and removals, and no wrong samples are refused."""
    run = recorded_run("sgd", tmp_path)
    scores = {"told": np.zeros((len(standard_queries().names), run.samples))}
    with pytest.raises(TypeError, match="unexpected keyword argument 'removal'"):
        backtrail.evaluate(run, scores, standard_queries(), removal=4)  # type: ignore[call-arg]
    with pytest.raises(BadSetting, match="shares"):
        backtrail.evaluate(run, scores, standard_queries(), removals=0, shares=(5.0,))
    with pytest.raises(BadSetting, match="removals"):
        backtrail.evaluate(run, scores, standard_queries(), removals=1)
    with pytest.raises(BadSetting, match=r"wrong=\[\]: expected some samples"):
        backtrail.evaluate(run, scores, standard_queries(), wrong=[], removals=0, shares=())


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    """Other runs, queries, states, shapes, NaN and mixed denominators are refused."""
    run = recorded_run("sgd", tmp_path)
    found = backtrail.DIT().attribute(run, standard_queries())
    with pytest.raises(OtherRun):
        backtrail.evaluate(recorded_run("sgd", tmp_path / "again"), found)
    with pytest.raises(WithoutQueries, match=r"Give queries=, the ones that it was computed for"):
        backtrail.evaluate(run, found, backtrail.Loss(run.task.data, aggregate="mean"))
    with pytest.raises(WithoutQueries, match=r"Give queries=, for example a backtrail\.Loss"):
        backtrail.evaluate(run, {"told": found.total()[:, -1].astype(np.float64)})
    with pytest.raises(NotObserved):
        backtrail.evaluate(run, backtrail.DIT().attribute(run, standard_queries(), observed_at=1))
    with pytest.raises(BadSetting, match=r"shape=\(1, 2\): expected shape"):
        backtrail.evaluate(run, {"told": np.zeros((1, 2))}, standard_queries())
    with pytest.raises(BadSetting, match="1 scores that are not finite"):
        bad = np.zeros((len(standard_queries().names), run.samples))
        bad[0, 1] = np.nan
        backtrail.evaluate(run, {"told": bad}, standard_queries())
    with pytest.raises(BadSetting, match="several by name"):
        backtrail.evaluate(run, {}, standard_queries())
    renormalized = backtrail.DIT(denominator="renormalize").attribute(run, standard_queries())
    with pytest.raises(BadSetting, match="denominator"):
        backtrail.evaluate(run, {"keep": found, "share": renormalized})
