"""How exact is each cell of the gate? python -m bench.gate.

For every row (what is trained) and column (the optimizer): the largest difference between influence
and brute force, relative to the largest derivative, over all queries and observed states, in
float64.
"""

import tempfile
from pathlib import Path

from tests import huggingface
from tests.gate import COLUMNS, ROWS, Cell, Row


def line(row: Row) -> str:
    """One row of the table."""
    errors = [Cell(row, column).error(Path(tempfile.mkdtemp()) / "run") for column in COLUMNS]
    return " | ".join([f"| {row.name:28}", *(f"{error:14.1e}" for error in errors)]) + " |"


def main() -> None:
    """Print the table."""
    print(" | ".join([f"| {'':28}", *(f"{column:14}" for column in COLUMNS)]) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row in [*ROWS, *huggingface.ROWS]:
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
