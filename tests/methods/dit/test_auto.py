"""`curvature="auto"` chooses the rules that predict removals best, once."""

from pathlib import Path

import numpy as np
import pytest

import backtrail
from backtrail.methods.dit import dit
from backtrail.methods.dit.auto import candidate_rules, choose_rules, describe_rules
from backtrail.queries import Query, values
from backtrail.queries.subset import evenly_spaced, spread
from backtrail.sweep.rules import Rules
from tests.oracles.agreement import agreement_with_removals
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

AUTO = backtrail.DIT(curvature="auto")


def test_the_choice_is_what_a_slow_measurement_says(tmp_path: Path) -> None:
    """The reason gives the measured agreements, and the first within 0.02 of the best is chosen."""
    run = recorded_run("adamw", tmp_path)
    rules = candidate_rules(run, backtrail.Tangent())
    figures = agreement_with_removals(run, rules, standard_queries())
    first = next(
        rule for rule, figure in zip(rules, figures, strict=True) if figure >= max(figures) - 0.02
    )
    found = AUTO.attribute(run, standard_queries())
    assert (found.settings["curvature"], found.settings["slope"]) == (
        repr(first.curvature),
        repr(first.slope),
    )
    for rule, figure in zip(rules, figures, strict=True):
        assert f"{describe_rules(rule)} {figure:.2f}" in str(found.settings["chosen"])
    assert "chosen='agreement with" in repr(found)
    same = backtrail.DIT(curvature=first.curvature, slope=first.slope).attribute(
        run, standard_queries()
    )
    assert (found.values() == same.values()).all()


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_secants_are_tried_where_they_differ(name: str, tmp_path: Path) -> None:
    """Secants are candidates under AdamW, but not under SGD or where a slope is given."""
    run = recorded_run(name, tmp_path)
    assert len(candidate_rules(run, backtrail.Tangent())) == (2 if name == "momentum" else 4)
    assert [type(rule.slope) for rule in candidate_rules(run, backtrail.Secant(3.0))] == [
        backtrail.Secant
    ] * 2


def test_the_better_candidate_wins_and_a_tie_goes_to_the_first(tmp_path: Path) -> None:
    """A candidate that predicts the removals wins over noise, and the first of several that do."""
    run = recorded_run("adamw", tmp_path)
    truth = backtrail.leave_one_out(run, standard_queries(), samples=range(run.samples))
    noise = np.random.default_rng(1).standard_normal(truth.shape)
    rules = candidate_rules(run, backtrail.Tangent())
    for good in ([1], [3], [0, 1], [2, 3]):
        made_up = {
            repr(rule): truth if place in good else noise for place, rule in enumerate(rules)
        }

        def predict(rule: Rules, _: Query, made_up: dict[str, np.ndarray] = made_up) -> np.ndarray:
            return made_up[repr(rule)]

        choice = choose_rules(
            run, standard_queries(), rules, predict=predict, state=run.steps, denominator="keep"
        )
        assert choice.rules == rules[good[0]]


def test_an_attribution_that_was_begun_keeps_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attribution that is opened again makes no second choice."""
    run = recorded_run("adamw", tmp_path)
    begun = AUTO.attribute(run, standard_queries(), out=tmp_path / "auto")

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(dit, "choose_rules", never)
    again = AUTO.attribute(run, standard_queries(), out=tmp_path / "auto")
    assert again.settings == begun.settings


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_queries_are_those_of_the_whole_set(count: int, tmp_path: Path) -> None:
    """A subset of queries has their names, values and influence, also for averaged weights."""
    run = recorded_run("adamw", tmp_path)
    state = run.state(run.steps)
    rows = spread(3, count)
    some = evenly_spaced(standard_queries(), count)
    whole = values(standard_queries(), run.task, params=state.params, buffers=state.buffers)
    assert (
        values(some, run.task, params=state.params, buffers=state.buffers) == whole[list(rows)]
    ).all()
    assert some.names == tuple(standard_queries().names[row] for row in rows)
    averaged = backtrail.Averaged(standard_queries(), decay=0.5)
    found = backtrail.DIT().attribute(run, evenly_spaced(averaged, count)).values()
    np.testing.assert_allclose(
        found, backtrail.DIT().attribute(run, averaged).values()[list(rows)], rtol=1e-12
    )
