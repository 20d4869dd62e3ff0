"""One sweep that fills the shards of a result, from the last step to the first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.accel.context import accelerated
from backtrail.influence.layout import Description
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.dit.checkpoint import CotangentStore
from backtrail.methods.dit.observing import CotangentSource
from backtrail.methods.memory import Budget
from backtrail.methods.renormalize import renormalize
from backtrail.sweep.adjoint import Cotangent, Sweep, SweptStep
from backtrail.sweep.rules import Rules
from backtrail.sweep.schedule import plan
from backtrail.sweep.trajectory import Trajectory


@final
@dataclass(frozen=True, slots=True)
class Attribution:
    """An attribution under way: one sweep over the shards that are missing, the last one first.

    Attributes:
        run: the training that is swept.
        source: where cotangents start.
        writer: of the result.
        store: where cotangents are kept for a sweep that is resumed.
    """

    run: Trajectory
    source: CotangentSource
    writer: InfluenceWriter
    store: CotangentStore

    @property
    def description(self) -> Description:
        """Everything about the result but its arrays."""
        return self.writer.description

    def fill(self, missing: Sequence[int], rules: Rules, cut: Budget) -> None:
        """Sweep from the end of the last missing shard to the first step, and write every shard.

        The sweep goes to step 0 also for a late window: what an early step changed is still in the
        states that the window compares.
        """
        _, stop = self.writer.shards[missing[-1]]
        cotangent = self._cotangent_at(stop)
        sweep = Sweep(
            load=self.run.state,
            transition=self.run.transition,
            add_queries=self.source.add,
            rules=rules,
            chunk=cut.chunk,
        )
        swept = sweep(plan(self.run.kept, stop, held=cut.held), cotangent)
        steps = iter(
            tqdm(swept, desc="attributing", total=stop, unit="step", disable=None, leave=False)
        )
        # Kept memory saves time. A single query by differences is a choice of the least memory.
        rows = len(self.description.queries) * len(self.description.observed_at)
        keep_memory = rules.curvature.product == "autograd" or rows > 1
        with accelerated(products=False, keep_memory=keep_memory):
            for shard in reversed(missing):
                self._fill_shard(shard, steps)
        self.store.clear()

    def _cotangent_at(self, stop: int) -> Cotangent | None:
        """The cotangents of the state after the last step of the sweep."""
        if stop < self.run.steps:
            # The steps from there on were swept before.
            return self.store.load(stop)
        if stop not in self.description.observed_at:
            # The sweep starts without cotangents, and meets the first ones on its way.
            return None
        return self.source.add(stop, self.run.state(stop, replay=True), None)

    def _fill_shard(self, shard: int, steps: Iterator[SweptStep]) -> None:
        """Write the steps of one shard, and mark it done once the sweep can resume before it."""
        first, stop = self.writer.shards[shard]
        queries, observed, _, slots = self.description.shape
        # Steps at or after an observed state have no influence on it: exactly zero.
        block = np.zeros((queries, observed, stop - first, slots))
        loss = np.full((stop - first, slots), np.nan)
        norms = np.full((queries, observed, stop - first), np.nan)
        for step in range(stop - 1, first - 1, -1):
            swept = next(steps)
            place = step - first
            width = len(swept.losses)
            columns = self._columns(len(swept.influence))
            block[:, columns, place, :width] = self._by_query(self._removals(swept.influence))
            norms[:, columns, place] = self._by_query(swept.norms[:, None])[..., 0]
            loss[place, :width] = swept.losses.cpu().numpy()
        self.writer.write(first, block, loss, cotangent=norms)
        if first > 0:
            # Before the mark: a shard that is done is never swept again.
            self.store.save(first, swept.cotangent)
        self.writer.mark_done(shard)

    def _columns(self, rows: int) -> list[int]:
        """Columns of the observed states whose cotangents exist, in the order of their rows.

        The sweep meets the latest observed state first.
        """
        latest = len(self.description.observed_at) - 1
        states = rows // len(self.description.queries)
        return [latest - number for number in range(states)]

    def _removals(self, influence: Float[Tensor, "row slot"]) -> Float[Tensor, "row slot"]:
        """Influence of removals with this attribution's denominator."""
        if self.description.denominator == "renormalize":
            return renormalize(influence)
        return influence

    def _by_query(
        self, rows: Float[Tensor, "row slot"]
    ) -> Float[np.ndarray, "query observed_at slot"]:
        """Split the rows, which are queries within observed states."""
        by_state = rows.cpu().reshape(-1, len(self.description.queries), rows.shape[1])
        return by_state.transpose(0, 1).numpy()
