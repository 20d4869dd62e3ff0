"""DIT equals brute force for every slot of every step, through recorder, run and sweep."""

from pathlib import Path

import pytest

import backtrail
from tests.cases import CASES, Case, record, rows
from tests.oracles.nudge import assert_exact, nudge_every_weight
from tests.standard_queries import standard_losses, standard_queries


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reverse_sweep_equals_nudging_each_weight(case: Case, tmp_path: Path) -> None:
    """The influence of every slot is the derivative by its weight of trainings from step 0 on."""
    model = case.built()
    data = rows()
    record(case, model, data, tmp_path / "run")
    run = backtrail.open_run(tmp_path / "run", case.task(model, data))
    run.verify()
    states = sorted({len(case.groups) - 1, len(case.groups)})
    influence = backtrail.DIT(chunk=2).attribute(run, standard_queries(), observed_at=states)
    assert_exact(influence.values(), nudge_every_weight(case, standard_losses, states))
