"""Diff-In's terms at every state looked at: paired with queries, with the rows themselves, or as changes of parameters.

A sample adds `scale` times its row's loss, over their number, to a step's loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from whence.methods.course import Course, Point, drawn
from whence.methods.differences import Differences, full_precision
from whence.methods.forms import Form
from whence.methods.memory import CACHE
from whence.methods.near import Near
from whence.methods.row_gradients import Proxy, RowGradients, evaluating
from whence.queries import Query, gradients
from whence.task import Batch
from whence.tree import Tree, add, each

MOST, FEWEST = 256, 32  # rows at once: of all, at most; of the proxy batch, at least


@final
@dataclass(frozen=True, slots=True)
class Terms:
    """The sum over the states of a training, in parts.

    Attributes:
        course: the training.
        form: which sum.
        differences: how second derivatives are taken.
        proxy: rows of the proxy batch.
        chunk: rows at once.
    """

    course: Course
    form: Form
    differences: Differences
    proxy: Sequence[int]
    chunk: int

    @staticmethod
    def of(
        course: Course, form: Form, differences: Differences, *, batch: int, seed: int, chunk: int | None
    ) -> "Terms":
        """Draw the proxy batch, and decide how many rows go through the model at once."""
        row = sum(tensor.nbytes for tensor in course.end.trained.values())
        room = CACHE if course.task.device.type == "cpu" else 16 * CACHE
        return Terms(course, form, differences, drawn(course, batch, seed), chunk or max(1, min(MOST, room // row)))

    @property
    def weight(self) -> float:
        """What every term counts."""
        count = len(self.course.samples) * len(self.course.points)
        return self.course.scale * self.form.factor(self.course.steps) / count

    def reach(self) -> float:
        """T times rate times the largest curvature, at the steepest of the states: the sums want it far below 1."""
        with evaluating(self.course.task), full_precision():
            return self.course.steps * max(self._near(point).steepness() for point in self.course.points)

    def of_queries(
        self, queries: Query, states: Sequence[int]
    ) -> Float64[np.ndarray, "query observed_at point sample"]:
        """The terms of all samples, paired with queries; zero at observed states before the steps they stand for."""
        course, number = self.course, len(queries.names)
        found = np.zeros((number, len(states), len(course.points), len(course.samples)))
        ends = [self._slopes(queries, course.look(state)) for state in states] if self.form.at_the_end else []
        for place, (point, (start, _)) in enumerate(zip(course.points, course.stretches, strict=True)):
            alive = [column for column, state in enumerate(states) if state > start]
            slopes = _joined([ends[c] for c in alive]) if self.form.at_the_end else self._slopes(queries, point)
            with evaluating(course.task), full_precision():
                near = self._near(point)
                score = self.form.scores(near, slopes)
                blocks = [score(batch) for batch in self._cut(near, course.samples.tolist())]
            by_state = torch.cat(blocks, 1).double().cpu().numpy().reshape(-1, number, len(course.samples))
            found[:, alive, place] = self.weight * by_state.transpose(1, 0, 2)
        return found

    def of_themselves(self, rows: Sequence[int]) -> Float64[np.ndarray, " row"]:
        """The sums of some rows, each paired with its own loss."""
        with evaluating(self.course.task), full_precision():
            nears = [self._near(point) for point in self.course.points]
            last = RowGradients(self.course.task, self.course.end)
            return self.weight * np.concatenate(
                [self._own(nears, last, rows[first : first + self.chunk]) for first in range(0, len(rows), self.chunk)]
            )

    def of_removal(self, rows: Sequence[int]) -> Tree:
        """The change of the parameters when some rows are removed together."""
        with evaluating(self.course.task), full_precision():
            return reduce(add, [self._change(self._near(point), rows) for point in self.course.points])

    def _near(self, point: Point) -> Near:
        rows = RowGradients(self.course.task, point)
        size = max(self.chunk, FEWEST)
        batches = [rows.read(self.proxy[first : first + size]) for first in range(0, len(self.proxy), size)]
        return Near(point, rows, Proxy(rows, batches, self.course.scale), self.differences)

    def _slopes(self, queries: Query, point: Point) -> Tree:
        names = tuple(point.rates)
        return gradients(queries, self.course.task, params=point.params, buffers=point.buffers, trained=names)[1]

    def _own(self, nears: Sequence[Near], last: RowGradients, rows: Sequence[int]) -> Float64[np.ndarray, " row"]:
        batch = last.read(rows)
        ends = last.each(batch, last.point.trained) if self.form.at_the_end else {}
        terms: Tensor = sum(self.form.own(near, batch, ends) for near in nears)  # type: ignore[assignment]
        return terms.double().cpu().numpy()

    def _change(self, near: Near, rows: Sequence[int]) -> Tree:
        batches = list(self._cut(near, rows))

        def total(trained: Tree) -> Tree:
            return reduce(add, [near.rows.sum(batch, trained) for batch in batches])

        return each(lambda tensor: self.weight * tensor, self.form.change(near, total))

    def _cut(self, near: Near, rows: Sequence[int]) -> list[Batch]:
        return [near.rows.read(rows[first : first + self.chunk]) for first in range(0, len(rows), self.chunk)]


def _joined(stacks: Sequence[Tree]) -> Tree:
    return {name: torch.cat([tree[name] for tree in stacks]) for name in stacks[0]}
