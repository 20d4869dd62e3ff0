"""What every row of the papers' tables does with its seeds: store each result, print the mean."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

Figures = dict[str, float]


def kept(place: Path, compute: Callable[[], Figures]) -> Figures:
    """The figures in a file; computed first where it is not there yet."""
    if not place.exists():
        found = compute()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found, indent=1))
    read: Figures = json.loads(place.read_text())
    return read


def told(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and 95 % interval (Student's t) over seeds, like `.85 ± .02`."""
    return f"{np.mean(values):{'+' if signed else ''}.3f} ± {half_width(values):.3f}"


def half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half of the 95 % t interval of a mean; NaN of one value."""
    found = np.asarray(values, dtype=np.float64)
    return (
        float(stats.t.ppf(0.975, len(found) - 1) * stats.sem(found))
        if len(found) > 1
        else float("nan")
    )


def line(cells: Sequence[object]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"
