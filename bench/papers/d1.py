"""D1: one epoch of MNIST with AdamW, every visit left out: Spearman of the sweep, 100 queries.

The trainings, their 150 x 100 removals and the figures are those of bench.table's cases once-*,
where every peer is beside them; what is not there yet is measured. One seed, as there.
"""

import json
from functools import partial
from math import isnan, nan

from bench.measure import measure as measured
from bench.measure import results
from bench.papers.rows import Figures, Row

RATES = ("1e-03", "1e-04", "1e-05")
OURS = {"backtrail--hessian": "Hessian", "backtrail--gauss-newton": "Gauss-Newton"}  # file: name
_BARS = {"gelu": "≥ .98", "relu": "ahead of every peer"}


def spearman(name: str, what: str) -> float:
    """What a method reached on a case, measured first where it was not."""
    if not (results(name, quick=False) / f"{what}.json").exists():
        measured(name, what, quick=False)
    figures = json.loads((results(name, quick=False) / f"{what}.json").read_text())
    return float(figures["spearman"]["estimate"]) if "spearman" in figures else float("nan")


def measure(seed: int, *, activation: str) -> Figures:
    """At all three rates; of the peers, the best that has been measured."""
    del seed
    found: Figures = {}
    for rate in RATES:
        name = f"once-{activation}-{rate}"
        if not (results(name, quick=False) / "truth.json").exists():
            measured(name, "truth", quick=False)
        found |= {f"lr {rate}, {label}": spearman(name, what) for what, label in OURS.items()}
        there = [path.stem for path in results(name, quick=False).glob("*.json")]
        peers = [
            spearman(name, what) for what in there if not what.startswith(("backtrail", "truth"))
        ]
        found[f"lr {rate}, best peer"] = max(
            (peer for peer in peers if not isnan(peer)), default=nan
        )
    return found


ROWS = tuple(
    Row(
        f"D1-{name}",
        f"MNIST, 784-16-16-10, {name.upper()}, one epoch",
        partial(measure, activation=name),
        seeds=1,
        bars={f"lr {rate}, Hessian": _BARS[name] for rate in RATES},
    )
    for name in ("gelu", "relu")
)
