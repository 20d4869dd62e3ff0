"""The papers' tables, row by row: python -m bench.papers [row ...] [--seeds n] [--show].

Every row is kept seed by seed, and what is there is not measured again; a row's name, or its
beginning, measures that row alone. Rows of a few figures are kept in bench/results/papers, and
their table is written to table.md there, which the documentation shows. Rows with tables of their
own print them; each is a module, with options that its first lines tell. BACKTRAIL_DATA names the
folder with the data.
"""

import argparse
import json
import sys
from runpy import run_module

from bench.papers import a1, a2, a4, a6, c1, c3, d1, stress
from bench.papers.rows import RESULTS, Row

MODULES = (a1, a2, a4, a6, c1, c3, d1, stress)
ROWS: tuple[Row, ...] = tuple(row for module in MODULES for row in module.ROWS)
OWN_TABLES = ("A3", "B1", "B2", "B3", "C2", "C4_forgetting", "C4_coreset")
HEAD = (
    "| row | quantity | published | required | here: mean ± 95 %, median | seeds |\n"
    "|---|---|---|---|---|---|"
)


def names() -> list[str]:
    """All rows."""
    return [*(row.name for row in ROWS), *OWN_TABLES]


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.papers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(names())}; default all")
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
    """Measure what is missing, then print and write the tables."""
    chosen = arguments()
    named = {
        name
        for name in names()
        if not chosen.rows or name.lower().startswith(tuple(map(str.lower, chosen.rows)))
    }
    for row in ROWS:
        if row.name in named and not chosen.show:
            row.fill(chosen.seeds or row.seeds)
    (RESULTS / "table.md").write_text(table() + "\n")
    print(table())
    for name in OWN_TABLES:
        if name in named and not chosen.show:
            print(f"\n{name}", flush=True)
            sys.argv = [f"bench.papers.{name.lower()}"]
            run_module(f"bench.papers.{name.lower()}", run_name="__main__")


if __name__ == "__main__":
    main()
