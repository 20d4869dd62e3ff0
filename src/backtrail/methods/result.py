"""What every method needs to begin its result: description, table of samples, and writer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from backtrail.influence.layout import VALUES, Description
from backtrail.influence.writer import InfluenceWriter
from backtrail.queries import Query, values
from backtrail.run.run import Run
from backtrail.sampling import uniforms
from backtrail.task.task import Task
from backtrail.tree import Tree

# An attribution is written, and can be resumed, in this many shards of steps, or in fewer if a
# shard would be shorter than the second number.
SHARDS = 20
SHORTEST = 8
# In the settings of an influence where batches were given by `recorder.fed`.
FED = "held constant; if what was fed depends on the model, influence through it is not included"
# In those of a model whose forward pass computes with numbers that torch does not follow.
HELD = "held constant: what the forward pass computes from values that it takes out of torch ({})"


def begin_or_resume(
    run: Run,
    description: Description,
    path: Path | None,
    *,
    queries: Query,
    sampled: bool = False,
) -> InfluenceWriter:
    """Begin the result of an attribution of all visits, or resume the one in the folder.

    Args:
        run: The recorded training.
        description: Everything but the arrays.
        path: The folder; None keeps the result in memory.
        queries: What is attributed. Their values are stored in the folder, since two sets of
            queries may have the same names.
        sampled: Whether the method samples, and its totals have standard errors.

    Raises:
        DifferentInfluence: The folder holds another influence.
    """
    if path is not None:
        state = run.state(run.kept[-1])
        description = with_values(description, queries, run.task, state.params, state.buffers)
    ids = run.ids if run.has_ids else None
    return InfluenceWriter.begin(
        path,
        description,
        sample=sample_table(run),
        dtype=precision(run),
        ids=ids,
        sampled=sampled,
    )


def with_values(
    description: Description, queries: Query, task: Task, params: Tree, buffers: Tree
) -> Description:
    """The description with sums over the queries' values at a state, to recognise them by.

    One is plain, one has a fixed random weight for each query, so that their order counts, and one
    is over the absolute values, which the others are compared relative to.
    """
    devices = [task.device] if task.device.type == "cuda" else []
    # Queries in train mode draw random numbers, the same ones each time.
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        found = values(queries, task, params=params, buffers=buffers)
    # NaN has no place in JSON, and a query of NaN is an error later on.
    numbers = np.nan_to_num(found.double().cpu().numpy())
    weights = uniforms(len(numbers), seed=0)
    sums = [numbers.sum(), numbers @ weights, np.abs(numbers).sum()]
    settings = dict(description.settings) | {VALUES: [float(number) for number in sums]}
    return replace(description, settings=settings)


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
    left_torch = run.task.binding.left_torch
    if left_torch:
        settings = {**settings, "held": HELD.format(", ".join(left_torch))}
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
