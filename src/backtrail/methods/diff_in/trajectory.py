"""A training as Diff-In sees it: some of its states, the rates there, and the rows trained on."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int

from backtrail import arguments
from backtrail.errors import NoSuchState, RowsNotReadable
from backtrail.methods.diff_in.finite_differences import at_least_float32
from backtrail.methods.step_factors import rates, shares
from backtrail.run.run import Run
from backtrail.task.task import Task
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Point:
    """One state of a training.

    Attributes:
        state: Its number t: how many updates were made before it.
        params: Every parameter, in float32 or a finer precision.
        buffers: Every buffer.
        rates: Learning rate of every trained parameter, as the update from this state used it.
    """

    state: int
    params: Tree
    buffers: Tree
    rates: dict[str, float]

    @property
    def trained(self) -> Tree:
        """The parameters that the optimizer changes."""
        return {name: self.params[name] for name in self.rates}

    def scaled(self, tree: Tree) -> Tree:
        """A gradient or a stack of them, times the learning rates: D G."""
        return {name: rate * tree[name] for name, rate in self.rates.items()}


@final
@dataclass(frozen=True, slots=True)
class Trajectory:
    """Some states of a training of T steps, in order.

    Attributes:
        task: Model, data and loss.
        steps: T.
        points: The states that the sum runs over.
        end: The final state, T.
        samples: The rows that were trained on, ascending.
        look: Returns a state by its number.
        scale: Sum of the factors c of a step: 1 for a mean loss.
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
        """Steps [start, stop) that every point stands for.

        They begin at the point before (the first at 0) and end at the point itself; those of the
        last point end with the training.
        """
        starts = [0, *(point.state for point in self.points[:-1])]
        stops = [*starts[1:], self.steps]
        return list(zip(starts, stops, strict=True))


def trajectory_of(run: Run, checkpoints: int | Sequence[int]) -> Trajectory:
    """Some states of a run: one from each of so many equal stretches of steps, or given ones.

    Raises:
        RowsNotReadable: Samples are ids, so that rows cannot be read again.
        FedOfAnotherForm: The task's loss cannot take rows as they are.
    """
    if run.has_ids:
        raise RowsNotReadable("DiffIn")
    # Every row is evaluated by itself; the first one tells whether that is possible.
    run.rows(run.seen[:1].tolist())
    states = chosen_states(run, checkpoints)
    points = {state: point_at(run, state) for state in {*states, run.steps}}

    def look(state: int) -> Point:
        if state in points:
            return points[state]
        return point_at(run, state)

    return Trajectory(
        task=run.task,
        steps=run.steps,
        points=tuple(points[state] for state in states),
        end=points[run.steps],
        samples=run.seen,
        look=look,
        scale=scale_of(run),
    )


def chosen_states(run: Run, checkpoints: int | Sequence[int]) -> list[int]:
    """Numbers of the states to look at, ascending.

    Args:
        run: A recorded run.
        checkpoints: How many: the last kept state of each of so many equal stretches of steps, or
            the end of the stretch where none was kept. Or the states themselves.

    Raises:
        NoSuchState: The run has no such state.
        BadSetting: No state, or state 0, at which nothing has been learned yet.
    """
    chosen = checkpoints_argument(checkpoints)
    if isinstance(chosen, int):
        return _evenly_spread(run, chosen)
    for state in chosen:
        if not 0 < state <= run.steps:
            raise NoSuchState(state, run.steps, "state")
    return sorted(set(chosen))


def checkpoints_argument(checkpoints: object) -> int | tuple[int, ...]:
    """How many states, or their numbers.

    Raises:
        BadSetting: It is something else, or state 0, at which nothing has been learned yet.
    """
    expected = (
        "a positive number of states, or the numbers of one or more states, from 1 (state 0 is "
        "untrained)"
    )
    if arguments.as_whole(checkpoints) is not None:
        return arguments.whole("checkpoints", checkpoints, least=1, expected=expected)
    return tuple(arguments.whole_numbers("checkpoints", checkpoints, least=1, expected=expected))


def _evenly_spread(run: Run, count: int) -> list[int]:
    # Fewer steps than stretches give equal ends, which count once.
    count = min(count, run.steps)
    ends = sorted({-(-run.steps * part // count) for part in range(count + 1)})
    states = []
    for start, end in pairwise(ends):
        last_kept = run.kept[bisect_right(run.kept, end) - 1]
        states.append(last_kept if last_kept > start else end)
    return states


def point_at(run: Run, number: int) -> Point:
    """A state of a run, replayed if it was not kept.

    Its rates are those of the update from it; the final state has those of the last update.
    Parameters that the update left alone have a rate of 0.
    """
    state = run.state(number, replay=True)
    step = run.step(min(number, run.steps - 1))
    by_name = {}
    for group, rate in zip(run.manifest.groups, rates(step.settings), strict=True):
        for name in group:
            by_name[name] = 0.0 if name in step.unused else rate
    params = at_least_float32(state.params)
    return Point(number, params, at_least_float32(state.buffers), by_name)


def scale_of(run: Run) -> float:
    """Mean over steps of the sum of the factors c: 1 for a mean loss, the batch size for a sum."""
    if run.task.reduce == "mean":
        return 1.0
    return float(np.mean([float(shares(run, index).sum()) for index in range(run.steps)]))


def spread_over_visits(
    sample: Int[np.ndarray, "step slot"], stretch: tuple[int, int]
) -> Float[np.ndarray, "step slot"]:
    """How a sample's term is spread over its visits: evenly over those in a stretch of steps.

    A sample without a visit there has it spread over its visits in the last step before the
    stretch that has some, or else in the first step after it.

    >>> spread_over_visits(np.array([[0, 1], [0, 2], [2, 2]]), (0, 2)).tolist()
    [[0.5, 1.0], [0.5, 1.0], [0.0, 0.0]]
    """
    first, stop = stretch
    steps = np.arange(len(sample))[:, None]
    visited = sample >= 0
    # How far a step is from the stretch. Steps after it are all farther than steps before it.
    after = steps - stop + 1 + len(sample)
    distance = np.where(steps < first, first - steps, np.where(steps < stop, 0, after))
    distance = np.broadcast_to(distance, sample.shape)
    nearest = np.full(sample.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(nearest, sample[visited], distance[visited])
    takes_part = visited & (distance == nearest[sample])
    visits = np.bincount(sample[takes_part], minlength=len(nearest))
    return np.where(takes_part, 1 / np.maximum(visits[sample], 1), 0.0)


def proxy_rows(trajectory: Trajectory, number: int, seed: int) -> list[int]:
    """Rows of the proxy batch, drawn without replacement from those trained on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(trajectory.samples), generator=generator)[:number]
    return [int(row) for row in trajectory.samples[np.sort(order.numpy())]]
