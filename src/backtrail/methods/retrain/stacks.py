"""A training run again under many changes at once, in stacks that begin where their first change does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.methods.averaging import read_states
from backtrail.methods.memory import bytes_of_activations
from backtrail.methods.retrain.weights import Change
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.rerun import rerun
from backtrail.tree import Tree

FEWEST, MOST = 8, 64  # trainings at once
ROOM = 128 * 2**20  # bytes of activations up to which more at once are faster on a processor
Observed = Iterator[tuple[int, State]]  # number of a state, and the stack of states there
Stack = tuple[
    list[int], Observed
]  # places of its changes among all; the unperturbed run is first and last


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rerunning:
    """How trainings are run again.

    Attributes:
        run: the training.
        observed_at: numbers of the states that are looked at.
        dtype: precision; None for the recorded one.
        batch: how many changes are run at once; None for as many as are of use.
        queries: what will be asked: an average over the training, if these read one.
    """

    run: Run
    observed_at: tuple[int, ...]
    dtype: torch.dtype | None
    batch: int | None
    queries: Query

    def stacks(self, changes: Sequence[Change]) -> Iterator[Stack]:
        """All changes, those that begin at about the same step together."""
        order = sorted(range(len(changes)), key=lambda place: changes[place].first(self.run))
        together = self.batch or (
            at_once(self.run, self.dtype) if len(changes) > FEWEST else FEWEST
        )
        blocks = range(0, len(order), together)
        for begin in tqdm(blocks, desc="re-running", unit="stack", disable=None, leave=False):
            some = order[begin : begin + together]
            yield some, self.observed([changes[place] for place in some])

    def observed(self, changes: Sequence[Change]) -> Observed:
        """The observed states of one stack: as it was, with each change, and as it was again; none before a change."""
        first = min(change.first(self.run) for change in changes)
        start = max(state for state in self.run.kept if state <= first)
        alike, runs = self.run.state(start, dtype=self.dtype), len(changes) + 2
        like = next(iter(alike.params.values()))

        def weights(step: int) -> Tensor:
            rows = [change.weights(self.run, step) for change in changes]
            return torch.stack([torch.ones_like(rows[0]), *rows, torch.ones_like(rows[0])]).to(like)

        steps = rerun(
            lambda step: self.run.transition(step, self.dtype),
            alike.repeat(runs),
            weights,
            start=start,
            stop=max(self.observed_at),
            trained=as_trained(self.run, start)
            if any(step.autocast for step in self.run.log)
            else None,
        )
        before = self._average(start)
        for number, states in read_states(self.queries, steps, before and before.repeat(runs)):
            if number in self.observed_at:
                yield number, states

    def _average(self, number: int) -> State | None:
        """The average as it was at a state, which the re-runs go on with; None where queries need none."""
        if not isinstance(self.queries, Averaged):
            return None
        walked = self.run.walk(min(self.queries.start, number), number, self.dtype)
        *_, (_, average) = read_states(self.queries, walked)
        return average


def as_trained(run: Run, start: int) -> Iterator[tuple[Tree, Tree]]:
    """The gradient before clipping, and the buffers left, of every step from `start` on, in the recorded precision."""
    state = run.state(start, replay=True)
    for index in range(start, run.steps):
        transition = run.transition(index)
        grads, buffers, _ = transition.raw_gradient(state)
        yield grads, buffers
        kept = index + 1 in run.kept
        state = (
            run.state(index + 1)
            if kept
            else transition.moved(state, transition.clipped(grads), buffers)
        )


def at_once(run: Run, dtype: torch.dtype | None) -> int:
    """How many re-runs share a stack where nobody says so: fewer, where their activations outgrow a cache."""
    if run.task.device.type != "cpu":
        return MOST
    kept = bytes_of_activations(run, twice=False)
    if dtype is not None:
        like = next(
            tensor.dtype
            for tensor in run.state(run.kept[-1]).params.values()
            if tensor.is_floating_point()
        )
        kept = kept * dtype.itemsize // like.itemsize
    return max(FEWEST, min(MOST, ROOM // max(kept, 1)))
