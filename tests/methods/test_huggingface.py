"""Models of `transformers` and `peft` pass the exactness gate as they are."""

from pathlib import Path

import pytest

from tests.gate import BAR, Cell, cells
from tests.huggingface import ROWS

# peft asks transformers for something by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("cell", cells(ROWS), ids=str)
def test_influence_equals_nudging_each_weight(cell: Cell, tmp_path: Path) -> None:
    """The gate of tests/gate.py, with models that people use."""
    assert cell.error(tmp_path / "run") <= BAR
