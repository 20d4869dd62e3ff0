"""What every method needs to begin its result: description, table of samples, and writer."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from backtrail.influence.layout import Description
from backtrail.influence.writer import InfluenceWriter
from backtrail.queries import Query
from backtrail.run.run import Run

# An attribution is written, and can be resumed, in this many shards of steps, or in fewer if a
# shard would be shorter than the second number.
SHARDS = 20
SHORTEST = 8
# In the settings of an influence where batches were given by `recorder.fed`.
FED = "held constant; if what was fed depends on the model, influence through it is not included"


def begin_or_resume(run: Run, description: Description, path: Path | None) -> InfluenceWriter:
    """Begin the result of an attribution of all visits, or resume the one in the folder.

    Raises:
        DifferentInfluence: The folder holds another influence.
    """
    ids = run.ids if run.has_ids else None
    return InfluenceWriter.begin(
        path, description, sample=sample_table(run), dtype=precision(run), ids=ids
    )


def describe(
    run: Run,
    queries: Query,
    states: tuple[int, ...],
    *,
    method: str,
    settings: Mapping[str, object],
    denominator: str = "keep",
) -> Description:
    """Describe an influence of queries at the observed states of a run."""
    if run.fed_may_depend_on_model:
        settings = {**settings, "fed": FED}
    return Description(
        method=method,
        unit=queries.unit,
        denominator=denominator,
        run=run.id,
        queries=queries.names,
        observed_at=states,
        steps=run.steps,
        slots=max(len(step.samples) for step in run.log),
        samples=run.samples,
        shard=max(SHORTEST, -(-run.steps // SHARDS)),
        settings=settings,
    )


def sample_table(run: Run) -> Int[np.ndarray, "step slot"]:
    """Build the table of the sample in every slot of every step; -1 pads short batches."""
    widths = [len(step.samples) for step in run.log]
    table = np.full((run.steps, max(widths)), -1, dtype=np.int64)
    for step, width in zip(run.log, widths, strict=True):
        table[step.index, :width] = step.samples
    return table


def precision(run: Run) -> str:
    """Name the precision of a run's influences: that of its parameters, at least float32."""
    double = all(layout.dtype == "float64" for layout in run.manifest.params.values())
    return "float64" if double else "float32"
