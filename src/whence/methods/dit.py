r"""Dynamic Influence Tracker (Xu & Wu, arXiv 2502.10793), exact, through any differentiable optimizer.

One adjoint sweep over the recorded steps gives, for every query q and observed state τ,

.. math:: I[q, \tau, t, b] = -\,\partial q(\theta_\tau) / \partial w_{t,b}

which the paper approximates for plain SGD and recomputes for every window.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from whence.errors import BadSetting
from whence.influence.influence import Influence
from whence.influence.layout import Description
from whence.influence.writer import InfluenceWriter
from whence.methods.again.retrain import Denominator
from whence.methods.choose import candidates, choose
from whence.methods.compiling import TOGETHER, Compiled, check_compiled, programs
from whence.methods.cotangents import CotangentStore
from whence.methods.memory import Budget, Limits, begun_chunk, begun_settings, budget, check_limits
from whence.methods.observe import ObservedAt, observed_states
from whence.methods.reading import Reading, reading
from whence.methods.renormalize import check_renormalizable, renormalized
from whence.queries import Averaged, Query
from whence.replay.curvature import Curvature, Hessian
from whence.replay.heap import kept_heap
from whence.replay.linearised import Product
from whence.replay.matrices import at_hand
from whence.replay.plan import plan
from whence.replay.reverse import Cotangent, Rules, Sweep, Swept
from whence.replay.slope import Slope, Tangent
from whence.run.run import Run

Policy = Curvature | Literal["auto"]
SHARDS, SHORTEST = 20, 8  # an attribution can resume at this many points, at least so many steps apart


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DIT:
    """Exact influence of every slot of every step, by one reverse sweep for all queries.

    Args:
        curvature: how the loss's second derivative is taken. "auto" leaves out some samples first and takes what
            predicts that best on this run, `Hessian` or `GaussNewton`, and for optimizers that bend also with `Secant`;
            `influence.settings["chosen"]` says why.
        slope: how the optimizer's answer to a change is taken: the derivative, or over the width of one removal.
        denominator: "keep" leaves a removed sample's place in the batch's mean; "renormalize" divides by one less.
        memory: bytes that a sweep may use beside the model; default half of what is free. It decides how many states
            are held and how many queries are pulled at once.
        chunk: how many queries are pulled at once, if you know better.
        compiled: "always" compiles the products of a step (a minute or two, kept by torch for the next time), "long"
            does so where the steps ahead are worth it; the numbers change in their last digits. It needs a C++
            compiler, and leaves out steps with dropout and products by "difference".

    Raises:
        BadSetting: names the setting, and what it may be.
    """

    curvature: Policy = field(default_factory=Hessian)
    slope: Slope = field(default_factory=Tangent)
    denominator: Denominator = "keep"
    memory: int | None = None
    chunk: int | None = None
    compiled: Compiled = "never"

    def __post_init__(self) -> None:
        """Refuse what a sweep would stumble over much later.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        if not isinstance(self.curvature, Curvature) and self.curvature != "auto":
            policies = "whence.Hessian(), GaussNewton(), EmpiricalFisher(), Zero() or 'auto'"
            raise BadSetting("curvature", self.curvature, policies)
        if isinstance(self.curvature, Curvature) and self.curvature.product not in get_args(Product):
            raise BadSetting("product", self.curvature.product, "'autograd' or 'difference'")
        if not isinstance(self.slope, Slope):
            raise BadSetting("slope", self.slope, "whence.Tangent() or whence.Secant()")
        if self.denominator not in get_args(Denominator):
            raise BadSetting("denominator", self.denominator, "'keep' or 'renormalize'")
        check_limits(memory=self.memory, chunk=self.chunk)
        check_compiled(self.compiled)

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
        path = None if out is None else Path(out)
        states = observed_states(run, observed_at)
        if self.denominator == "renormalize":
            check_renormalizable(run)
        begun = begun_settings(path)
        rules, why = self._decided(run, queries, state=states[-1], begun=begun)
        wanted: Compiled = self.compiled if not begun else "always" if begun.get("compiled") else "never"
        limits = Limits(memory=self.memory, chunk=self.chunk or begun_chunk(path))
        fit = partial(budget, run, queries, len(states), twice=rules.curvature.product == "autograd")
        cut = fit(limits=limits)
        if wanted != "never":
            wide = fit(limits=replace(limits, together=TOGETHER))
            rows = len(queries.names) * len(states)
            made = programs(run, rules, rows, chunk=wide.chunk, ordinary=cut.chunk, compiled=wanted)
            rules, cut = replace(rules, programs=made), wide if made else cut
        settings: dict[str, object] = {"curvature": repr(rules.curvature), "slope": repr(rules.slope)}
        settings |= {"chunk": cut.chunk, "exact": rules.exact} | why | ({"compiled": True} if rules.programs else {})
        if isinstance(queries, Averaged):
            settings["average"] = queries.about
        about = replace(described(run, queries, states), denominator=self.denominator, settings=settings)
        writer = begun_writer(run, about, path)
        if len(writer.done) < len(writer.shards):
            _Filling(run, reading(run, queries, states), writer, CotangentStore(writer.path)).fill(rules, cut)
        return writer.finish().with_queries(queries)

    def _decided(
        self, run: Run, queries: Query, *, state: int, begun: dict[str, object]
    ) -> tuple[Rules, dict[str, object]]:
        """The rules of the sweep, and why they were chosen, where they were; an attribution that was begun goes on."""
        if isinstance(self.curvature, Curvature):
            return Rules(self.curvature, self.slope), {}
        found = candidates(run, self.slope)
        if "chosen" in begun:
            made = (begun["curvature"], begun["slope"])
            return next(r for r in found if (repr(r.curvature), repr(r.slope)) == made), {"chosen": begun["chosen"]}

        def predict(rules: Rules, some: Query) -> Float[np.ndarray, "query sample"]:
            alone = replace(self, curvature=rules.curvature, slope=rules.slope, chunk=None)
            return alone.attribute(run, some, observed_at=state).total()[:, 0]

        choice = choose(run, queries, found, predict=predict, state=state, denominator=self.denominator)
        return choice.rules, {"chosen": choice.why}


@final
@dataclass(frozen=True, slots=True)
class _Filling:
    """An attribution under way: sweeps over the shards that are not done, from the last to the first."""

    run: Run
    reading: Reading
    writer: InfluenceWriter
    store: CotangentStore

    @property
    def about(self) -> Description:
        return self.writer.description

    def fill(self, rules: Rules, cut: Budget) -> None:
        missing = [shard for shard in range(len(self.writer.shards)) if shard not in self.writer.done]
        stop = self.writer.shards[missing[-1]][1]
        cotangent = self.store.load(stop) if stop < self.run.steps else self.met_at_the_end()
        sweep = Sweep(self.run.state, self.run.transition, self.reading.meet, rules=rules, chunk=cut.chunk)
        swept = sweep(plan(self.run.kept, stop, held=cut.held), cotangent)
        bar = iter(tqdm(swept, desc="attributing", total=stop, unit="step", disable=None, leave=False))
        # Differences are asked for to save memory, and time is what a kept heap saves.
        with at_hand(), kept_heap() if rules.curvature.product == "autograd" else nullcontext():
            for shard in reversed(missing):
                self.fill_shard(shard, bar)
        self.store.clear()

    def fill_shard(self, shard: int, swept: Iterator[Swept]) -> None:
        """Write the steps of one shard; mark it done once the way on from there is safe."""
        first, stop = self.writer.shards[shard]
        block = np.zeros((*self.about.shape[:2], stop - first, self.about.slots))
        loss, norms = np.full(block.shape[2:], np.nan), np.full(block.shape[:3], np.nan)
        for step in range(stop - 1, first - 1, -1):
            found, place = next(swept), step - first
            width, alive = len(found.losses), self.alive(len(found.influence))
            block[:, alive, place, :width] = self.by_state(found.influence)
            norms[:, alive, place] = self.by_state(found.norms[:, None])[..., 0]
            loss[place, :width] = found.losses.cpu().numpy()
        self.writer.write(first, block, loss, cotangent=norms)
        if first > 0:
            self.store.save(first, found.cotangent)
        self.writer.mark_done(shard)

    def met_at_the_end(self) -> Cotangent | None:
        """The cotangents of the queries that read the final state; None if it is not observed."""
        last = self.run.steps
        if last not in self.about.observed_at:
            return None
        return self.reading.meet(last, self.run.state(last, replay=True), None)

    def alive(self, rows: int) -> list[int]:
        """Columns of the observed states whose cotangents are on their way, the latest state first."""
        last = len(self.about.observed_at) - 1
        return [last - block for block in range(rows // len(self.about.queries))]

    def by_state(self, rows: Tensor) -> np.ndarray:
        """From (state, query) x slot to [query, state, slot]."""
        if rows.shape[1] > 1 and self.about.denominator == "renormalize":
            rows = renormalized(rows)
        return rows.cpu().reshape(-1, len(self.about.queries), rows.shape[1]).transpose(0, 1).numpy()


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
