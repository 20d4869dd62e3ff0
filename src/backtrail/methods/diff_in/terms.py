"""Diff-In's terms at every state looked at: paired with queries, with the rows themselves, or as changes of parameters.

A sample adds `scale` times its row's loss, over their number, to a step's loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from backtrail.accel.allocator import keep_heap
from backtrail.accel.onednn import fast_products
from backtrail.methods.diff_in.finite_differences import Differences, full_precision
from backtrail.methods.diff_in.forms import EndGradients, Form
from backtrail.methods.diff_in.local_model import LocalModel
from backtrail.methods.diff_in.row_gradients import Proxy, RowGradients
from backtrail.methods.diff_in.trajectory import Point, Trajectory, drawn
from backtrail.methods.memory import CACHE
from backtrail.queries import Query, gradients
from backtrail.task.task import Batch, evaluating
from backtrail.tree import Tree, add, each

MOST, FEWEST = 256, 32  # rows at once: of all, at most; of the proxy batch, at least


@final
@dataclass(frozen=True, slots=True)
class Terms:
    """The sum over the states of a training, in parts.

    Attributes:
        trajectory: the training.
        form: which sum.
        differences: how second derivatives are taken.
        proxy: rows of the proxy batch.
        chunk: rows at once.
    """

    trajectory: Trajectory
    form: Form
    differences: Differences
    proxy: Sequence[int]
    chunk: int

    @staticmethod
    def of(
        trajectory: Trajectory,
        form: Form,
        differences: Differences,
        *,
        batch: int,
        seed: int,
        chunk: int | None,
    ) -> "Terms":
        """Draw the proxy batch, and decide how many rows go through the model at once."""
        row = sum(tensor.nbytes for tensor in trajectory.end.trained.values())
        room = CACHE if trajectory.task.device.type == "cpu" else 16 * CACHE
        return Terms(
            trajectory,
            form,
            differences,
            drawn(trajectory, batch, seed),
            chunk or max(1, min(MOST, room // row)),
        )

    @property
    def weight(self) -> float:
        """What every term counts."""
        count = len(self.trajectory.samples) * len(self.trajectory.points)
        return self.trajectory.scale * self.form.factor(self.trajectory.steps) / count

    def reach(self) -> float:
        """T times rate times the largest curvature, at the steepest of the states: the sums want it far below 1."""
        with evaluating(self.trajectory.task), full_precision(), keep_heap(), fast_products():
            return self.trajectory.steps * max(near.steepness() for near in self._nears())

    def of_queries(
        self, queries: Query, states: Sequence[int]
    ) -> Float64[np.ndarray, "query observed_at point sample"]:
        """The terms of all samples, paired with queries; zero at observed states before the steps they stand for."""
        trajectory, number = self.trajectory, len(queries.names)
        found = np.zeros((number, len(states), len(trajectory.points), len(trajectory.samples)))
        ends = (
            [self._slopes(queries, trajectory.look(state)) for state in states]
            if self.form.at_the_end
            else []
        )
        alive = [
            [place for place, state in enumerate(states) if state > start]
            for start, _ in trajectory.stretches
        ]
        slopes = [
            [ends[place] for place in places]
            if self.form.at_the_end
            else [self._slopes(queries, point)]
            for point, places in zip(trajectory.points, alive, strict=True)
        ]
        with evaluating(trajectory.task), full_precision(), keep_heap(), fast_products():
            nears = self._nears()
            told = [place for place, places in enumerate(alive) if places]
            scores = {place: self.form.scores(nears[place], slopes[place]) for place in told}
            for first, batch in self._cut(nears[0].rows, trajectory.samples.tolist()):
                for place, score in scores.items():
                    by_state = score(batch).double().cpu().numpy()
                    columns = slice(first, first + by_state.shape[1])
                    by_state = by_state.reshape(-1, number, by_state.shape[1]).transpose(1, 0, 2)
                    found[:, alive[place], place, columns] = self.weight * by_state
        return found

    def of_themselves(
        self, rows: Sequence[int], *, rank: int | None
    ) -> Float64[np.ndarray, " row"]:
        """The sums of some rows, each paired with its own loss; through so many directions, if that is cheaper."""
        with evaluating(self.trajectory.task), full_precision(), keep_heap(), fast_products():
            nears = self._nears()
            if rank is not None and 2 * rank < len(rows):
                nears = [near.within(rank) for near in nears]
            last = RowGradients(self.trajectory.task, self.trajectory.end)
            return self.weight * np.concatenate(
                [self._own(nears, last, batch) for _, batch in self._cut(last, rows)]
            )

    def of_removal(self, rows: Sequence[int]) -> Tree:
        """The change of the parameters when some rows are removed together."""
        with evaluating(self.trajectory.task), full_precision(), keep_heap(), fast_products():
            return reduce(add, [self._change(near, rows) for near in self._nears()])

    def _nears(self) -> list[LocalModel]:
        """The states, with the proxy batch read once."""
        rows = [RowGradients(self.trajectory.task, point) for point in self.trajectory.points]
        size, read = max(self.chunk, FEWEST), rows[0].read
        batches = [
            read(self.proxy[first : first + size]) for first in range(0, len(self.proxy), size)
        ]
        return [
            LocalModel(one.point, one, Proxy(one, batches, self.trajectory.scale), self.differences)
            for one in rows
        ]

    def _slopes(self, queries: Query, point: Point) -> Tree:
        names = tuple(point.rates)
        return gradients(
            queries, self.trajectory.task, params=point.params, buffers=point.buffers, trained=names
        )[1]

    def _own(
        self, nears: Sequence[LocalModel], last: RowGradients, batch: Batch
    ) -> Float64[np.ndarray, " row"]:
        ends = EndGradients(
            last.point, last.each(batch, last.point.trained) if self.form.at_the_end else {}
        )
        terms: Tensor = sum(self.form.own(near, batch, ends) for near in nears)  # type: ignore[assignment]
        return terms.double().cpu().numpy()

    def _change(self, near: LocalModel, rows: Sequence[int]) -> Tree:
        batches = [batch for _, batch in self._cut(near.rows, rows)]

        def total(trained: Tree) -> Tree:
            return reduce(add, [near.rows.sum(batch, trained) for batch in batches])

        return each(lambda tensor: self.weight * tensor, self.form.change(near, total))

    def _cut(self, reader: RowGradients, rows: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """Rows, read a chunk at a time, with the place of each chunk's first."""
        for first in range(0, len(rows), self.chunk):
            yield first, reader.read(rows[first : first + self.chunk])
