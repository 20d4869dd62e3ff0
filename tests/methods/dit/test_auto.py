"""`curvature="auto"`: the choice is what a slow measurement of every candidate says, and it is made once."""

from pathlib import Path

import numpy as np
import pytest

import backtrail
from backtrail import stats
from backtrail.methods.dit import dit
from backtrail.methods.dit.auto import SEED, candidates, choose, told
from backtrail.queries import Query, values
from backtrail.queries.subset import evenly_spaced, spread
from backtrail.run.run import Run
from backtrail.sweep.rules import Rules
from tests.methods.dit.test_dit import recorded
from tests.methods.dit.test_exact import asked

AUTO = backtrail.DIT(curvature="auto")


def slow_figures(run: Run, rules: list[Rules], query: Query) -> list[float]:
    """Every candidate against the same removals, one query and one removal at a time; groups have one sample here."""
    draw, count = np.random.default_rng(SEED), len(query.names)
    visited = sorted({sample for step in run.log for sample in step.samples})
    ones = draw.choice(visited, min(30, len(visited)), replace=False).tolist()
    groups = [int(draw.choice(visited, 1, replace=False)[0]) for _ in range(32)]
    single = backtrail.leave_one_out(run, query, samples=ones)
    many = np.stack(
        [backtrail.leave_one_out(run, query, samples=[one])[:, 0] for one in groups], axis=1
    )
    figures = []
    for rule in rules:
        influence = backtrail.DIT(curvature=rule.curvature, slope=rule.slope).attribute(run, query)
        total = {
            sample: influence.total()[:, 0, place]
            for place, sample in enumerate(influence.ids.tolist())
        }
        alone, together = (
            np.stack([total[one] for one in some], axis=1) for some in (ones, groups)
        )
        row = [stats.pearson(alone[q], single[q]) for q in range(count)]
        row += [stats.spearman(together[q], many[q]) for q in range(count)]
        figures.append(float(np.mean(row)))
    return figures


def test_the_choice_is_what_a_slow_measurement_says(tmp_path: Path) -> None:
    """The figures told are those of the removals; the choice is the first within the margin of the best."""
    run = recorded("adamw", tmp_path)
    rules = candidates(run, backtrail.Tangent())
    figures = slow_figures(run, rules, asked())
    first = next(
        rule for rule, figure in zip(rules, figures, strict=True) if figure >= max(figures) - 0.02
    )
    found = AUTO.attribute(run, asked())
    assert (found.settings["curvature"], found.settings["slope"]) == (
        repr(first.curvature),
        repr(first.slope),
    )
    for rule, figure in zip(rules, figures, strict=True):
        assert f"{told(rule)} {figure:.2f}" in str(found.settings["chosen"])
    assert "chosen='agreement with" in repr(found)
    same = backtrail.DIT(curvature=first.curvature, slope=first.slope).attribute(run, asked())
    assert (found.values() == same.values()).all()


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_secants_are_tried_where_they_differ(name: str, tmp_path: Path) -> None:
    """Not for plain descent, and not where a slope was asked for."""
    run = recorded(name, tmp_path)
    assert len(candidates(run, backtrail.Tangent())) == (2 if name == "momentum" else 4)
    assert [type(rule.slope) for rule in candidates(run, backtrail.Secant(3.0))] == [
        backtrail.Secant
    ] * 2


def test_the_better_candidate_wins_and_a_tie_goes_to_the_first(tmp_path: Path) -> None:
    """By predictions that are made up: the truth itself, and noise."""
    run = recorded("adamw", tmp_path)
    truth = backtrail.leave_one_out(run, asked(), samples=range(run.samples))
    noise = np.random.default_rng(1).standard_normal(truth.shape)
    rules = candidates(run, backtrail.Tangent())
    for good in ([1], [3], [0, 1], [2, 3]):
        made_up = {
            repr(rule): truth if place in good else noise for place, rule in enumerate(rules)
        }

        def predict(rule: Rules, _: Query, made_up: dict[str, np.ndarray] = made_up) -> np.ndarray:
            return made_up[repr(rule)]

        choice = choose(run, asked(), rules, predict=predict, state=run.steps, denominator="keep")
        assert choice.rules == rules[good[0]]


def test_an_attribution_that_was_begun_keeps_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left out a second time."""
    run = recorded("adamw", tmp_path)
    begun = AUTO.attribute(run, asked(), out=tmp_path / "auto")

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(dit, "choose", never)
    again = AUTO.attribute(run, asked(), out=tmp_path / "auto")
    assert again.settings == begun.settings


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_queries_are_those_of_the_whole_set(count: int, tmp_path: Path) -> None:
    """Same names, values and influence; also of averaged weights."""
    run = recorded("adamw", tmp_path)
    state, rows = run.state(run.steps), spread(3, count)
    some = evenly_spaced(asked(), count)
    whole = values(asked(), run.task, params=state.params, buffers=state.buffers)
    assert (
        values(some, run.task, params=state.params, buffers=state.buffers) == whole[list(rows)]
    ).all()
    assert some.names == tuple(asked().names[row] for row in rows)
    averaged = backtrail.Averaged(asked(), decay=0.5)
    found = backtrail.DIT().attribute(run, evenly_spaced(averaged, count)).values()
    np.testing.assert_allclose(
        found, backtrail.DIT().attribute(run, averaged).values()[list(rows)], rtol=1e-12
    )
