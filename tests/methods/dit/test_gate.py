"""Every row and column of the table in tests/gate.py, in float64, against brute force."""

from pathlib import Path

import pytest

import backtrail
from backtrail.accel import second_order
from tests.gate import BAR, ROWS, Cell, cells


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small layers use the hand-written second derivatives, as large ones do."""
    monkeypatch.setattr(second_order, "MIN_ENTRIES", 1)


@pytest.mark.parametrize("cell", cells(ROWS), ids=str)
def test_influence_equals_nudging_each_weight(cell: Cell, tmp_path: Path) -> None:
    """Influence differs from brute force by at most 1e-6 of the largest, accelerated or not."""
    assert cell.error(tmp_path / "run", accelerated=(True, False)) <= BAR


def test_the_gate_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivative without BatchNorm's statistics fails in BatchNorm's row, and in no other."""
    normed, dropped = (Cell(row, "SGD + momentum") for row in ROWS[1:3])
    monkeypatch.setattr(backtrail.Task, "running", ())
    assert normed.error(tmp_path / "normed") > 1e-2
    assert dropped.error(tmp_path / "dropped") <= BAR


def test_the_gate_has_every_row() -> None:
    """The table has all rows, in order."""
    wanted = (
        "tied",
        "BatchNorm",
        "dropout",
        "augmentation",
        "frozen",
        "LoRA",
        "padding",
        "contrastive",
    )
    for name, row in zip(wanted, ROWS, strict=True):
        assert name in row.name
