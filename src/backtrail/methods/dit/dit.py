r"""Dynamic Influence Tracker (Xu & Wu, arXiv 2502.10793), exact, through any differentiable optimizer.

One adjoint sweep over the recorded steps gives, for every query q and observed state τ,

.. math:: I[q, \tau, t, b] = -\,\partial q(\theta_\tau) / \partial w_{t,b}

which the paper approximates for plain SGD and recomputes for every window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.accel.context import accelerated
from backtrail.curvature.policies import Curvature, Hessian
from backtrail.curvature.vjp import Product
from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.dit.auto import candidates, choose
from backtrail.methods.dit.checkpoint import CotangentStore
from backtrail.methods.dit.observing import Reading, reading
from backtrail.methods.memory import (
    Budget,
    Limits,
    begun_chunk,
    begun_settings,
    budget,
    check_limits,
)
from backtrail.methods.observe import ObservedAt, observed_states
from backtrail.methods.renormalize import check_renormalizable, renormalized
from backtrail.methods.result import begun_writer, described
from backtrail.methods.retrain.retrain import Denominator
from backtrail.optim.slopes import Slope, Tangent
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.sweep.adjoint import Cotangent, Sweep, Swept
from backtrail.sweep.rules import Rules
from backtrail.sweep.schedule import plan

Policy = Curvature | Literal["auto"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DIT:
    """Exact influence of every slot of every step, by one reverse sweep for all queries.

    Args:
        curvature: how the loss's second derivative is taken. "auto" leaves out some samples first
            and takes what predicts that best on this run, `Hessian` or `GaussNewton`, and for
            optimizers that bend also with `Secant`; `influence.settings["chosen"]` says why.
        slope: how the optimizer's answer to a change is taken: the derivative, or over the width of
            one removal.
        denominator: "keep" leaves a removed sample's place in the batch's mean; "renormalize"
            divides by one less.
        memory: bytes that a sweep may use beside the model; default half of what is free. It
            decides how many states are held and how many queries are pulled at once.
        chunk: how many queries are pulled at once, if you know better.

    Raises:
        BadSetting: names the setting, and what it may be.
    """

    curvature: Policy = field(default_factory=Hessian)
    slope: Slope = field(default_factory=Tangent)
    denominator: Denominator = "keep"
    memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuse what a sweep would stumble over much later.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        if not isinstance(self.curvature, Curvature) and self.curvature != "auto":
            policies = "backtrail.Hessian(), GaussNewton(), EmpiricalFisher(), Zero() or 'auto'"
            raise BadSetting("curvature", self.curvature, policies)
        if isinstance(self.curvature, Curvature) and self.curvature.product not in get_args(
            Product
        ):
            raise BadSetting("product", self.curvature.product, "'autograd' or 'difference'")
        if not isinstance(self.slope, Slope):
            raise BadSetting("slope", self.slope, "backtrail.Tangent() or backtrail.Secant()")
        if self.denominator not in get_args(Denominator):
            raise BadSetting("denominator", self.denominator, "'keep' or 'renormalize'")
        check_limits(memory=self.memory, chunk=self.chunk)

    @exclusive
    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = "end",
        out: str | Path | None = None,
    ) -> Influence:
        """Influence of every training sample at every step on the queries.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful.

        Args:
            run: the recorded training.
            queries: what is asked; all are answered by one sweep.
            observed_at: the states that the queries read: "end", "epochs", a number, or several.
            out: folder of the result. If it holds an unfinished attribution of the same question,
                that one is resumed, to the same bits. None keeps the result in memory.
        """
        path = None if out is None else Path(out)
        states = observed_states(run, observed_at)
        if self.denominator == "renormalize":
            check_renormalizable(run)
        begun = begun_settings(path)
        rules, why = self._decided(run, queries, state=states[-1], begun=begun)
        limits = Limits(memory=self.memory, chunk=self.chunk or begun_chunk(path))
        twice = rules.curvature.product == "autograd"
        cut = budget(run, queries, len(states), twice=twice, limits=limits)
        settings: dict[str, object] = {
            "curvature": repr(rules.curvature),
            "slope": repr(rules.slope),
        }
        settings |= {"chunk": cut.chunk, "exact": rules.exact} | why
        if isinstance(queries, Averaged):
            settings["average"] = queries.about
        about = replace(
            described(run, queries, states), denominator=self.denominator, settings=settings
        )
        writer = begun_writer(run, about, path)
        if len(writer.done) < len(writer.shards):
            _Filling(run, reading(run, queries, states), writer, CotangentStore(writer.path)).fill(
                rules, cut
            )
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
            return next(r for r in found if (repr(r.curvature), repr(r.slope)) == made), {
                "chosen": begun["chosen"]
            }

        def predict(rules: Rules, some: Query) -> Float[np.ndarray, "query sample"]:
            alone = replace(self, curvature=rules.curvature, slope=rules.slope, chunk=None)
            return alone.attribute(run, some, observed_at=state).total()[:, 0]

        choice = choose(
            run, queries, found, predict=predict, state=state, denominator=self.denominator
        )
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
        missing = [
            shard for shard in range(len(self.writer.shards)) if shard not in self.writer.done
        ]
        stop = self.writer.shards[missing[-1]][1]
        cotangent = self.store.load(stop) if stop < self.run.steps else self.met_at_the_end()
        sweep = Sweep(
            self.run.state, self.run.transition, self.reading.meet, rules=rules, chunk=cut.chunk
        )
        swept = sweep(plan(self.run.kept, stop, held=cut.held), cotangent)
        bar = iter(
            tqdm(swept, desc="attributing", total=stop, unit="step", disable=None, leave=False)
        )
        # Kept memory saves time. A single query by differences is a choice of the least memory.
        rows = len(self.about.queries) * len(self.about.observed_at)
        keep_memory = rules.curvature.product == "autograd" or rows > 1
        with accelerated(products=False, keep_memory=keep_memory):
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
        return (
            rows.cpu().reshape(-1, len(self.about.queries), rows.shape[1]).transpose(0, 1).numpy()
        )
