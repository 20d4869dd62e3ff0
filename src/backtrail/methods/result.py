"""What every method needs to begin its result: the description, the table of samples, and the writer."""

from pathlib import Path

import numpy as np

from backtrail.influence.layout import Description
from backtrail.influence.writer import InfluenceWriter
from backtrail.queries import Query
from backtrail.run.run import Run

SHARDS, SHORTEST = (
    20,
    8,
)  # an attribution can resume at this many points, at least so many steps apart


def begun_writer(run: Run, about: Description, path: Path | None) -> InfluenceWriter:
    """Begin the result of an attribution of all visits, or go on with the one in the folder."""
    ids = run.ids if run.has_ids else None
    return InfluenceWriter.begin(path, about, sample=slots(run), dtype=precision(run), ids=ids)


def precision(run: Run) -> str:
    """Precision of a run's influences: that of its parameters, at least float32."""
    double = all(layout.dtype == "float64" for layout in run.manifest.params.values())
    return "float64" if double else "float32"


def slots(run: Run) -> np.ndarray:
    """Sample in every slot of every step, `[step, slot]`; -1 pads short batches."""
    widths = [len(step.samples) for step in run.log]
    table = np.full((run.steps, max(widths)), -1, dtype=np.int64)
    for step, width in zip(run.log, widths, strict=True):
        table[step.index, :width] = step.samples
    return table


def described(run: Run, queries: Query, states: tuple[int, ...]) -> Description:
    """What an influence of these queries on this run is about."""
    return Description(
        method="DIT",
        unit=queries.unit,
        denominator="keep",
        run=run.id,
        queries=queries.names,
        observed_at=states,
        steps=run.steps,
        slots=max(len(step.samples) for step in run.log),
        samples=run.samples,
        shard=max(SHORTEST, -(-run.steps // SHARDS)),
    )
