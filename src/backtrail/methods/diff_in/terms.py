"""Diff-In's terms at every state: paired with queries, with the rows themselves, or as changes.

A sample adds `scale` times its row's loss, divided by the number of samples, to a step's loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import final

import numpy as np
import torch
from jaxtyping import Float64

from backtrail.accel.context import accelerated
from backtrail.methods.diff_in.finite_differences import Differences, full_precision
from backtrail.methods.diff_in.forms import EndGradients, Form
from backtrail.methods.diff_in.local_model import LocalModel
from backtrail.methods.diff_in.row_gradients import Proxy, RowGradients
from backtrail.methods.diff_in.trajectory import Point, Trajectory, proxy_rows
from backtrail.methods.memory import CACHE
from backtrail.queries import Query, gradients
from backtrail.task.task import Batch, in_eval_mode
from backtrail.tree import Tree, add, each

MOST_ROWS = 256  # rows whose gradients are taken at once, at most
FEWEST_PROXY_ROWS = 32  # rows of the proxy batch that go through the model at once, at least
GPU_ROOM = 16  # on a GPU gradients may take so many times the memory that they may on a processor


@final
@dataclass(frozen=True, slots=True)
class Terms:
    """The sum over the states of a training, in parts.

    Attributes:
        trajectory: The training.
        form: Which sum.
        differences: How second derivatives are taken.
        proxy: Rows of the proxy batch.
        chunk: Rows at once through the model.
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
        """Draw the proxy batch, and decide how many rows go through the model at once.

        Args:
            trajectory: The training.
            form: Which sum.
            differences: How second derivatives are taken.
            batch: Rows in the proxy batch.
            seed: Of the draw.
            chunk: Rows at once; None decides by the size of a row's gradient.
        """
        if chunk is None:
            gradient_bytes = sum(tensor.nbytes for tensor in trajectory.end.trained.values())
            on_cpu = trajectory.task.device.type == "cpu"
            room = CACHE if on_cpu else GPU_ROOM * CACHE
            chunk = max(1, min(MOST_ROWS, room // gradient_bytes))
        rows = proxy_rows(trajectory, batch, seed)
        return Terms(trajectory, form, differences, rows, chunk)

    @property
    def weight(self) -> float:
        """Factor before every term."""
        count = len(self.trajectory.samples) * len(self.trajectory.points)
        return self.trajectory.scale * self.form.factor(self.trajectory.steps) / count

    def reach(self) -> float:
        """T times the largest learning rate times curvature over the states.

        The sums of both forms are expansions in this number: they hold while it is far below 1.
        """
        with self._computing():
            steepest = max(model.steepness() for model in self._local_models())
        return self.trajectory.steps * steepest

    def of_queries(
        self, queries: Query, states: Sequence[int]
    ) -> Float64[np.ndarray, "query observed_at point sample"]:
        """The terms of all samples, paired with queries.

        A term is zero at observed states that lie before the steps it stands for.

        Args:
            queries: What is asked.
            states: Numbers of the observed states.
        """
        trajectory = self.trajectory
        count = len(queries.names)
        shape = (count, len(states), len(trajectory.points), len(trajectory.samples))
        result = np.zeros(shape)
        # By point: places of the observed states after the first of its steps.
        later = [
            [place for place, state in enumerate(states) if state > start]
            for start, _ in trajectory.stretches
        ]
        query_gradients = self._query_gradients(queries, states, later)
        with self._computing():
            models = self._local_models()
            scores = {}
            for index, model in enumerate(models):
                if later[index]:
                    scores[index] = self.form.scores(model, query_gradients[index])
            for first, batch in self._batches(models[0].rows, trajectory.samples.tolist()):
                for index, score in scores.items():
                    # [direction, row], where directions are [observed state, query] or [query].
                    flat = score(batch).double().cpu().numpy()
                    rows = flat.shape[1]
                    by_query = flat.reshape(-1, count, rows).transpose(1, 0, 2)
                    columns = slice(first, first + rows)
                    result[:, later[index], index, columns] = self.weight * by_query
        return result

    def _query_gradients(
        self, queries: Query, states: Sequence[int], later: Sequence[Sequence[int]]
    ) -> list[list[Tree]]:
        """Gradients of the queries that each point's terms are paired with."""
        trajectory = self.trajectory
        if not self.form.pairs_at_observed_state:
            return [[self._gradients(queries, point)] for point in trajectory.points]
        observed = [self._gradients(queries, trajectory.look(state)) for state in states]
        return [[observed[place] for place in places] for places in later]

    def of_themselves(
        self, rows: Sequence[int], *, rank: int | None
    ) -> Float64[np.ndarray, " row"]:
        """The sums of some rows, each paired with the gradient of its own loss.

        Args:
            rows: Row numbers.
            rank: Directions through which curvature is taken where that is cheaper; None: never.
        """
        with self._computing():
            models = self._local_models()
            if rank is not None and 2 * rank < len(rows):
                models = [model.within(rank) for model in models]
            end = RowGradients(self.trajectory.task, self.trajectory.end)
            sums = [self._own(models, end, batch) for _, batch in self._batches(end, rows)]
        return self.weight * np.concatenate(sums)

    def of_removal(self, rows: Sequence[int]) -> Tree:
        """The change of the parameters when some rows are removed together."""
        with self._computing():
            return reduce(add, [self._change(model, rows) for model in self._local_models()])

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Eval mode, and kernels precise enough for differences."""
        with ExitStack() as stack:
            stack.enter_context(in_eval_mode(self.trajectory.task))
            stack.enter_context(full_precision())
            stack.enter_context(accelerated(keep_memory=True))
            yield

    def _local_models(self) -> list[LocalModel]:
        """The loss around every point; the proxy batch is read once for all."""
        rows = [RowGradients(self.trajectory.task, point) for point in self.trajectory.points]
        size = max(self.chunk, FEWEST_PROXY_ROWS)
        batches = []
        for first in range(0, len(self.proxy), size):
            batches.append(rows[0].read(self.proxy[first : first + size]))
        rows[-1].refuse_coupled(batches[0])
        models = []
        for at_point in rows:
            proxy = Proxy(at_point, batches, self.trajectory.scale)
            models.append(LocalModel(at_point.point, at_point, proxy, self.differences))
        return models

    def _gradients(self, queries: Query, point: Point) -> Tree:
        """Gradients of the queries at a point, `[query, ...]`."""
        _, by_parameter, _ = gradients(
            queries,
            self.trajectory.task,
            params=point.params,
            buffers=point.buffers,
            trained=tuple(point.rates),
        )
        return by_parameter

    def _own(
        self, models: Sequence[LocalModel], end: RowGradients, batch: Batch
    ) -> Float64[np.ndarray, " row"]:
        at_end: Tree = {}
        if self.form.pairs_at_observed_state:
            at_end = end.each(batch, end.point.trained)
        ends = EndGradients(end.point, at_end)
        terms = [self.form.own(model, batch, ends) for model in models]
        return torch.stack(terms).sum(0).double().cpu().numpy()

    def _change(self, model: LocalModel, rows: Sequence[int]) -> Tree:
        batches = [batch for _, batch in self._batches(model.rows, rows)]

        def total(trained: Tree) -> Tree:
            return reduce(add, [model.rows.sum(batch, trained) for batch in batches])

        change = self.form.change(model, total)
        return each(lambda tensor: self.weight * tensor, change)

    def _batches(self, reader: RowGradients, rows: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """Read rows a chunk at a time; yield the place of each first row, and the chunk."""
        for first in range(0, len(rows), self.chunk):
            yield first, reader.read(rows[first : first + self.chunk])
