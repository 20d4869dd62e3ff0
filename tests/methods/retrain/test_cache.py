"""Results of re-runs are stored in a folder, the bank, and not computed again."""

from pathlib import Path

import numpy as np
import pytest

import backtrail
from backtrail.errors import BadSetting, DamagedBank, OtherRun
from backtrail.methods.retrain.stacks import Reruns
from tests.cases import rows
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

GROUPS = [[0], [4], [0, 3, 5]]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any further re-run fail."""

    def refuse(self: Reruns, changes: object) -> None:
        raise AssertionError(f"{self} was to run {changes} again")

    monkeypatch.setattr(Reruns, "observed", refuse)


@pytest.mark.parametrize("name", ["momentum", "batchnorm, adamw"])
def test_a_bank_answers_any_query_as_the_reruns_would(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bank gives any query's change bit for bit, at any observed state and in any order."""
    run = recorded_run(name, tmp_path)
    bank = tmp_path / "bank"
    other = backtrail.Loss(rows(4), aggregate="mean")
    ours, theirs = (
        backtrail.retrain(run, q, GROUPS, observed_at=[1, run.steps]).change
        for q in (standard_queries(), other)
    )
    first = backtrail.retrain(
        run, standard_queries(), GROUPS, observed_at=[1, run.steps], bank=bank
    )
    np.testing.assert_array_equal(first.change, ours)
    forbid(monkeypatch)
    found = backtrail.retrain(run, other, GROUPS[::-1], observed_at="end", bank=bank)
    np.testing.assert_array_equal(found.change[:, 0], theirs[:, 1, ::-1])
    assert found.noise.max() == 0


def test_only_what_is_missing_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and weights that a bank does not have are added to it."""
    run = recorded_run("adamw", tmp_path)
    bank = tmp_path / "bank"
    backtrail.retrain(run, standard_queries(), GROUPS[:2], bank=bank)
    both = backtrail.retrain(run, standard_queries(), GROUPS, bank=bank).change
    np.testing.assert_allclose(
        both, backtrail.retrain(run, standard_queries(), GROUPS).change, rtol=1e-9, atol=1e-14
    )
    doubled = backtrail.retrain(run, standard_queries(), GROUPS, weight=2.0, bank=bank).change
    assert not np.allclose(doubled, both)
    assert len(list(bank.iterdir())) == 3
    forbid(monkeypatch)
    np.testing.assert_array_equal(
        backtrail.retrain(run, standard_queries(), GROUPS, bank=bank).change, both
    )
    np.testing.assert_array_equal(
        backtrail.retrain(run, standard_queries(), GROUPS, weight=2.0, bank=bank).change, doubled
    )


def test_a_sample_that_was_never_visited_changes_nothing(tmp_path: Path) -> None:
    """A sample that was not visited in the chosen steps changes nothing, from the bank too."""
    run = recorded_run("momentum", tmp_path)
    bank = tmp_path / "bank"
    steps = (run.steps - 1, run.steps)
    unseen = next(row for row in range(run.samples) if row not in run.log[-1].samples)
    for _ in range(2):
        assert (
            backtrail.leave_one_out(
                run, standard_queries(), samples=[unseen], steps=steps, bank=bank
            )
            == 0
        ).all()


def test_a_bank_of_another_run_or_of_something_else_is_refused(tmp_path: Path) -> None:
    """A bank of another run, an averaged query and damaged files are refused, with what to do."""
    run = recorded_run("sgd", tmp_path)
    bank = tmp_path / "bank"
    backtrail.retrain(run, standard_queries(), GROUPS, bank=bank)
    with pytest.raises(OtherRun):
        backtrail.retrain(
            recorded_run("sgd", tmp_path / "again"), standard_queries(), GROUPS, bank=bank
        )
    with pytest.raises(BadSetting, match="bank"):
        backtrail.retrain(run, backtrail.Averaged(standard_queries()), GROUPS, bank=bank)
    next(bank.iterdir()).write_bytes(b"something else")
    with pytest.raises(DamagedBank, match="delete the file"):
        backtrail.retrain(run, standard_queries(), GROUPS, bank=bank)
    with pytest.raises(DamagedBank, match="a folder of its own"):
        backtrail.retrain(run, standard_queries(), GROUPS, bank=run.path / "states")
    with pytest.raises(BadSetting, match="this is a file"):
        backtrail.retrain(run, standard_queries(), GROUPS, bank=run.path / "manifest.json")
