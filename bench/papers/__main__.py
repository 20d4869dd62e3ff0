"""The papers' tables, row by row: python -m bench.papers [row ...] [--seeds n] [--show].

Every row is kept seed by seed in bench/results/papers, and what is there is not measured again; a row's name, or its
beginning, measures that row alone. WHENCE_DATA names the folder with the data. The table is printed, and written to
bench/results/papers/table.md, which the documentation shows.
"""

import argparse
import json

from bench.papers import a1, a2, a6, c1, c3, d1
from bench.papers.rows import RESULTS, Row

MODULES = (a1, a2, a6, c1, c3, d1)
ROWS: tuple[Row, ...] = tuple(row for module in MODULES for row in module.ROWS)
HEAD = "| row | figure | published | bar | here: mean ± 95 %, median | seeds |\n|---|---|---|---|---|---|"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.papers", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(row.name for row in ROWS)}; default all")
    parser.add_argument("--seeds", type=int, help="how many; default what each row says")
    parser.add_argument("--show", action="store_true", help="measure nothing; only make the table")
    return parser.parse_args()


def table() -> str:
    """All rows that have figures, and what they were measured with."""
    lines = [HEAD, *(line for row in ROWS for line in row.lines())]
    files = [json.loads(row.path.read_text()) for row in ROWS if row.path.exists()]
    when = sorted({f"{told['date']} at {told['commit']}" for told in files})
    return "\n".join([*lines, "", f"Measured {'; '.join(when)}."])


def main() -> None:
    """Measure what is missing, then print and write the table."""
    chosen = arguments()
    for row in ROWS:
        named = not chosen.rows or any(row.name.lower().startswith(name.lower()) for name in chosen.rows)
        if named and not chosen.show:
            row.fill(chosen.seeds or row.seeds)
    (RESULTS / "table.md").write_text(table() + "\n")
    print(table())


if __name__ == "__main__":
    main()
