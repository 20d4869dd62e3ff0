r"""Dynamic Influence Tracker (Xu & Wu, arXiv 2502.10793), exact, through any differentiable optimizer.

One adjoint sweep over the recorded steps gives, for every query q and observed state τ,

.. math:: I[q, \tau, t, b] = -\,\partial q(\theta_\tau) / \partial w_{t,b}

which the paper approximates for plain SGD and recomputes for every window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from whence.influence.influence import Influence
from whence.influence.layout import Description
from whence.influence.writer import InfluenceWriter
from whence.methods.cotangents import CotangentStore
from whence.methods.memory import Budget, begun_chunk, budget
from whence.methods.observe import ObservedAt, observed_states
from whence.methods.renormalize import check_renormalizable, renormalized
from whence.queries import Query, gradients
from whence.replay.curvature import Curvature, Hessian
from whence.replay.plan import plan
from whence.replay.reverse import Cotangent, Sweep, Swept, start
from whence.replay.state import State
from whence.run.run import Run

Denominator = Literal["keep", "renormalize"]
SHARDS = 20  # an attribution can resume at this many points


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DIT:
    """Exact influence of every slot of every step, by one reverse sweep for all queries.

    Args:
        curvature: how the loss's second derivative is taken.
        denominator: "keep" leaves a removed sample's place in the batch's mean; "renormalize" divides by one less.
        memory: bytes that a sweep may use beside the model; default half of what is free. It decides how many states
            are held and how many queries are pulled at once.
        chunk: how many queries are pulled at once, if you know better.
    """

    curvature: Curvature = field(default_factory=Hessian)
    denominator: Denominator = "keep"
    memory: int | None = None
    chunk: int | None = None

    def attribute(
        self, run: Run, queries: Query, *, observed_at: ObservedAt = "end", out: str | Path | None = None
    ) -> Influence:
        """Influence of every training sample at every step on the queries.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful, negative harmful.

        Args:
            run: the recorded training.
            queries: what is asked; all are answered by one sweep.
            observed_at: the states that the queries read: "end", "epochs", a number, or several.
            out: folder of the result. If it holds an unfinished attribution of the same question, that one is resumed,
                to the same bits. None keeps the result in memory.
        """
        states = observed_states(run, observed_at)
        path = None if out is None else Path(out)
        if self.denominator == "renormalize":
            check_renormalizable(run)
        found = budget(run, len(queries.names) * len(states), memory=self.memory, chunk=self.chunk or begun_chunk(path))
        about = _description(run, queries, states, self.denominator, {"chunk": found.chunk, "curvature": repr(self.curvature)})
        writer = InfluenceWriter.begin(path, about, sample=slots(run), dtype=_dtype(run))
        if len(writer.done) < len(writer.shards):
            _fill(run, queries, writer, found, self)
        return writer.finish().with_queries(queries)


def _fill(run: Run, queries: Query, writer: InfluenceWriter, found: Budget, dit: DIT) -> None:
    """Sweep over the shards that are not done, from the last to the first."""
    about = writer.description
    store = CotangentStore(writer.path)
    missing = [shard for shard in range(len(writer.shards)) if shard not in writer.done]
    stop = writer.shards[missing[-1]][1]
    cotangent = store.load(stop) if stop < run.steps else _begin(run, queries, about, stop, None)
    sweep = Sweep(
        load=run.state,
        transition=run.transition,
        begin=lambda number, state: _begin(run, queries, about, number, state),
        curvature=dit.curvature,
        chunk=found.chunk,
    )
    swept = sweep(plan(run.kept, stop, held=found.held), cotangent)
    bar = iter(tqdm(swept, desc="attributing", total=stop, unit="step", disable=None, leave=False))
    for shard in reversed(missing):
        _fill_shard(shard, bar, writer, store, renormalize=dit.denominator == "renormalize")
    store.clear()


def _fill_shard(
    shard: int, swept: Iterator[Swept], writer: InfluenceWriter, store: CotangentStore, *, renormalize: bool
) -> None:
    """Write the steps of one shard; mark it done once the way on from there is safe."""
    about, (first, stop) = writer.description, writer.shards[shard]
    block = np.zeros((len(about.queries), len(about.observed_at), stop - first, about.slots))
    loss, norms = np.full(block.shape[2:], np.nan), np.full(block.shape[:3], np.nan)
    for step in range(stop - 1, first - 1, -1):
        found = next(swept)
        rows = renormalized(found.influence) if renormalize else found.influence
        width, alive = len(found.losses), _alive(about, len(rows))
        block[:, alive, step - first, :width] = _by_state(rows, len(about.queries))
        norms[:, alive, step - first] = _by_state(found.norms[:, None], len(about.queries))[..., 0]
        loss[step - first, :width] = found.losses.cpu().numpy()
    writer.write(first, block, loss, norms)
    if first > 0:
        store.save(first, found.cotangent)
    writer.mark_done(shard)


def _begin(run: Run, queries: Query, about: Description, number: int, state: State | None) -> Cotangent | None:
    """The cotangents of the queries that read this state; None if it is not observed."""
    if number not in about.observed_at:
        return None
    state = state or run.state(number, replay=True)
    _, params, buffers = gradients(queries, run.task, state.params, state.buffers, trained=run.trained)
    return start(state, params, buffers)


def _alive(about: Description, rows: int) -> list[int]:
    """Columns of the observed states whose cotangents are on their way, the latest state first."""
    last = len(about.observed_at) - 1
    return [last - block for block in range(rows // len(about.queries))]


def _by_state(rows: Tensor, queries: int) -> np.ndarray:
    """From rows (state, query) x slot to [query, state, slot]."""
    return rows.cpu().reshape(-1, queries, rows.shape[1]).transpose(0, 1).numpy()


def _dtype(run: Run) -> str:
    double = all(layout.dtype == "float64" for layout in run.manifest.params.values())
    return "float64" if double else "float32"


def slots(run: Run) -> np.ndarray:
    """Row of the training set in every slot of every step, `[step, slot]`; -1 pads short batches."""
    widths = [len(step.samples) for step in run.log]
    table = np.full((run.steps, max(widths)), -1, dtype=np.int64)
    for step, width in zip(run.log, widths, strict=True):
        table[step.index, :width] = step.samples
    return table


def _description(
    run: Run, queries: Query, states: tuple[int, ...], denominator: str, settings: dict[str, object]
) -> Description:
    return Description(
        method="DIT",
        unit=queries.unit,
        denominator=denominator,
        run=run.id,
        queries=queries.names,
        observed_at=states,
        steps=run.steps,
        slots=max(len(step.samples) for step in run.log),
        samples=run.samples,
        shard=max(1, -(-run.steps // SHARDS)),
        settings=settings,
    )
