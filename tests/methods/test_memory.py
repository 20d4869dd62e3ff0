"""What a sweep's memory is estimated from."""

from pathlib import Path

import pytest

import backtrail
from backtrail.methods.memory import bytes_of_activations
from tests.cases import ADAMW, Case, one_group, record, rows


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4], [5]], [[5], [0, 1, 2, 3, 4]]])
def test_activations_are_those_of_the_largest_micro_batch(
    batches: list[list[int]], tmp_path: Path
) -> None:
    """Wherever in its step it stands: as much as the same rows alone."""
    accumulated = Case("accumulated", one_group(ADAMW, lr=0.01), accumulate=2, batches=batches)
    alone = Case("alone", one_group(ADAMW, lr=0.01), batches=[[0, 1, 2, 3, 4]])
    found = []
    for case in (accumulated, alone):
        model = case.built()
        data = rows()
        record(case, model, data, tmp_path / case.name)
        run = backtrail.open_run(tmp_path / case.name, case.task(model, data))
        found.append(bytes_of_activations(run, twice=True))
    assert found[0] == found[1] > 0
