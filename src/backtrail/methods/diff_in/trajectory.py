"""A training as Diff-In sees it: some states along it, the rates there, and the rows of its training set."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int

from backtrail.errors import BadSetting, NoSuchState, RowsNotReadable
from backtrail.methods.diff_in.finite_differences import precise
from backtrail.methods.step_factors import rates, shares
from backtrail.run.run import Run
from backtrail.task.task import Task
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Point:
    """One state of a training.

    Attributes:
        state: its number t: updates before it.
        params: every parameter, in float32 or finer.
        buffers: every buffer.
        rates: the learning rate of every trained parameter, as the update from this state used it.
    """

    state: int
    params: Tree
    buffers: Tree
    rates: dict[str, float]

    @property
    def trained(self) -> Tree:
        """The parameters that the optimizer moves."""
        return {name: self.params[name] for name in self.rates}

    def scaled(self, tree: Tree) -> Tree:
        """A gradient, or a stack of them, times the rates: what a step makes of it."""
        return {name: rate * tree[name] for name, rate in self.rates.items()}


@final
@dataclass(frozen=True, slots=True)
class Trajectory:
    """Some states of a training of T steps, in order.

    Attributes:
        task: model, data and loss.
        steps: T.
        points: the states looked at.
        end: the result of the training, T.
        samples: the rows that were trained on.
        look: a state by its number.
        scale: the sum of the factors c of a step, 1 for a mean loss.
    """

    task: Task
    steps: int
    points: tuple[Point, ...]
    end: Point
    samples: np.ndarray
    look: Callable[[int], Point]
    scale: float = 1.0

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The steps that every point stands for: those since the point before; the last one up to the end."""
        starts = [0, *(point.state for point in self.points[:-1])]
        return list(zip(starts, [*starts[1:], self.steps], strict=True))


def trajectory_of(run: Run, checkpoints: int | Sequence[int]) -> Trajectory:
    """Look at a run: one state in each of so many equal stretches of steps, or given ones.

    Raises:
        RowsNotReadable: the samples are ids.
    """
    if run.has_ids:
        raise RowsNotReadable("DiffIn")
    states = chosen_states(run, checkpoints)
    points = {state: point_at(run, state) for state in {*states, run.steps}}

    def look(state: int) -> Point:
        return points[state] if state in points else point_at(run, state)

    looked_at = tuple(points[state] for state in states)
    return Trajectory(
        run.task, run.steps, looked_at, points[run.steps], run.seen, look, scale_of(run)
    )


def chosen_states(run: Run, checkpoints: int | Sequence[int]) -> list[int]:
    """The last kept state of each of so many equal stretches (its end, where none was kept), or the given states.

    Raises:
        NoSuchState: a state that the run does not have.
        BadSetting: no state at all, or the one before training, which knows nothing.
    """
    if not (checkpoints > 0 if isinstance(checkpoints, int) else len(checkpoints)):
        raise BadSetting(
            "checkpoints", checkpoints, "a number from 1, or the numbers of one or more states"
        )
    if not isinstance(checkpoints, int):
        if 0 in checkpoints:
            raise BadSetting(
                "checkpoints",
                list(checkpoints),
                f"states from 1 to {run.steps}: state 0 is untrained",
            )
        for state in checkpoints:
            if not 0 < state <= run.steps:
                raise NoSuchState(state, run.steps, "state")
        return sorted({int(state) for state in checkpoints})
    ends = sorted({-(-run.steps * part // checkpoints) for part in range(checkpoints + 1)})
    before = [run.kept[bisect_right(run.kept, end) - 1] for end in ends[1:]]
    return [
        kept if kept > start else end
        for kept, start, end in zip(before, ends[:-1], ends[1:], strict=True)
    ]


def point_at(run: Run, number: int) -> Point:
    """A state of a run, replayed where it was not kept; its rates are those of the update from it, or of the last."""
    state, step = run.state(number, replay=True), run.step(min(number, run.steps - 1))
    groups = zip(run.manifest.groups, rates(step.settings), strict=True)
    by_name = {name: rate * (name not in step.unused) for group, rate in groups for name in group}
    return Point(number, precise(state.params), precise(state.buffers), by_name)


def scale_of(run: Run) -> float:
    """The sum of the factors c of a step's slots, on average: 1 for a mean, the size of the batch for a sum."""
    if run.task.reduce == "mean":
        return 1.0
    return float(np.mean([float(shares(run, index).sum()) for index in range(run.steps)]))


def spread(
    sample: Int[np.ndarray, "step slot"], stretch: tuple[int, int]
) -> Float[np.ndarray, "step slot"]:
    """How a term of every sample is spread over its visits: evenly over those in a stretch of steps.

    Where it has none there, over those of the last step before that has some, or else of the first
    one after.

    >>> spread(np.array([[0, 1], [0, 2], [2, 2]]), (0, 2)).tolist()
    [[0.5, 1.0], [0.5, 1.0], [0.0, 0.0]]
    """
    steps, visited = np.arange(len(sample))[:, None], sample >= 0
    first, stop = stretch
    away = np.where(
        steps < first, first - steps, np.where(steps < stop, 0, steps - stop + 1 + len(sample))
    )
    away = np.broadcast_to(away, sample.shape)
    nearest = np.full(sample.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(nearest, sample[visited], away[visited])
    takes = visited & (away == nearest[sample])
    number = np.bincount(sample[takes], minlength=len(nearest))
    return np.where(takes, 1 / np.maximum(number[sample], 1), 0.0)


def drawn(trajectory: Trajectory, number: int, seed: int) -> list[int]:
    """The proxy batch: rows drawn without replacement, the same for a seed."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(trajectory.samples), generator=draw)[:number]
    return [int(row) for row in trajectory.samples[np.sort(order.numpy())]]
