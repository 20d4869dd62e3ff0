"""Three regimes of influence ÷ learning rate, on a small language model.

python -m bench.papers.b2 [seed ...]

Published (GPT-2): 6.1e-4 in a very short start, 1.1e-6 in a long basin, 1.6e-5 at the end. Here:
`backtrail.regimes` of the exact influence on the mean loss of 64 validation rows and on four of
them alone, of Data Value Embedding (following Adam, and as published) on the mean and on all 64
alone, and of TracIn. The first is drawn into docs/images. The training is bench.papers.shakespeare.
"""

import sys
from pathlib import Path

import numpy as np

import backtrail
from backtrail.influence.analysis.regimes import Regimes
from backtrail.queries import Query
from backtrail.stats import pearson
from bench.papers.shakespeare import influence, rows, run

PICTURE = Path("docs/images/regimes.png")


def questions() -> list[tuple[str, str, Query]]:
    """Method, name of the answer's folder, and what is asked."""
    validation = rows()[1]
    mean = backtrail.Loss(validation, aggregate="mean")
    return [
        ("dit", "validation", mean),
        ("dit", "rows", backtrail.Loss(validation, samples=range(4))),
        ("dve-adam", "validation", mean),
        ("dve-adam-body", "validation", mean),
        ("dve-rate", "validation", mean),
        ("dve-rate", "rows", backtrail.Loss(validation)),
        ("tracin", "validation", mean),
    ]


def line(name: str, seed: int, found: Regimes) -> str:
    """One row of the table."""
    first, second = found.boundaries
    cells = [f"{seed}", name, "yes" if found.found else "no", f"{found.explained:.0%}"]
    shares = [f"{share:.1%}" for share in found.table()["share"]]
    levels = [f"{level:.2g}" for level in found.levels]
    ratios = [f"{ratio:.1f}" for ratio in found.ratios]
    groups = [" / ".join(texts) for texts in (shares, levels, ratios)]
    return f"| {' | '.join([*cells, f'{first}, {second}', *groups])} |"


def main(seeds: list[int]) -> None:
    """Print the table, and draw the picture."""
    columns = (
        "three? | explained | boundaries | share of steps | levels | start, end ÷ basin | "
        "Pearson with DIT"
    )
    print(f"| seed | influence | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        recorded, exact = run(seed), None
        for method, name, queries in questions():
            given = influence(recorded, name, queries, method=method)
            exact = exact or given
            agreed = (
                pearson(exact.total()[:, -1], given.total()[:, -1])[0]
                if name == "validation"
                else np.nan
            )
            found = backtrail.regimes(recorded, given)
            print(line(f"{method}, {name}", seed, found), end=f" {agreed:.2f} |\n", flush=True)
            if (seed, method, name) == (0, "dit", "validation"):
                axes = backtrail.plot.regimes(found)
                axes.figure.savefig(PICTURE, dpi=110)  # type: ignore[union-attr]


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0])
