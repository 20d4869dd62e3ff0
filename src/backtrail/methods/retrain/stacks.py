"""A training run again under many changes of weights, in stacks of runs that share every kernel."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.errors import StrayedRerun
from backtrail.methods.averaging import read_states
from backtrail.methods.memory import bytes_of_activations
from backtrail.methods.retrain.weights import WeightChange
from backtrail.queries import Averaged, Query
from backtrail.run.run import AUTOCAST, Run
from backtrail.step.state import State
from backtrail.sweep.rerun import rerun, select_run
from backtrail.tree import Tree, norm

log = logging.getLogger(__name__)

# Runs per stack, where the caller does not say.
FEWEST_RUNS = 8
MOST_RUNS = 64
# Activations of a stack that still fit a processor's caches: beyond, larger stacks are no faster.
ACTIVATION_BYTES = 128 * 2**20

# Distance of the unperturbed run from the recorded training, as a share of the way that the
# training has gone, from which on the reason is looked for. Rounding in float32 (1e-7) has grown
# 10^5-fold then. The distance alone cannot tell it from other noise: a chaotic training gets there
# as well.
STRAYED = 1e-2
# Relative difference of two gradients at one state. The recorder itself allows 1e-3 for rounding in
# float32; other noise or another branch of the model changes a gradient by a large part of itself.
OTHER_GRADIENT = 1e-2
UNMOVED = 1e-6  # share of the parameters' norm below which a training has not moved
TINY = 1e-30  # in place of a norm that is zero

# Numbers of observed states, each with the stack of states there: a row per run.
ObservedStates = Iterator[tuple[int, State]]


@final
@dataclass(frozen=True, slots=True)
class RunStack:
    """Several runs of one training, side by side.

    Attributes:
        places: places of the stack's changes among all changes.
        states: the observed states. Row 0 is the unperturbed run, then comes one row per change,
            then the unperturbed run once more: what differs between those two is rounding.
    """

    places: Sequence[int]
    states: ObservedStates


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reruns:
    """How a training is run again.

    Attributes:
        run: the recorded training.
        observed_at: numbers of the states that are read.
        dtype: precision; None for the recorded one.
        batch: changes per stack; None lets `runs_at_once` decide.
        queries: what will read the states: if it reads an average, that is what is observed.
        remarks: what has to be said about the re-runs, once they are made.
    """

    run: Run
    observed_at: tuple[int, ...]
    dtype: torch.dtype | None
    batch: int | None
    queries: Query
    remarks: list[str] = field(default_factory=list)

    def stacks(self, changes: Sequence[WeightChange]) -> Iterator[RunStack]:
        """Run all changes, those that begin at about the same step in one stack."""
        # A stack starts where its earliest change does, so sorting saves steps.
        order = sorted(range(len(changes)), key=lambda place: changes[place].first(self.run))
        size = self._stack_size(len(changes))
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc="re-running", unit="stack", disable=None, leave=False):
            places = order[start : start + size]
            yield RunStack(places, self.observed([changes[place] for place in places]))

    def _stack_size(self, changes: int) -> int:
        if self.batch is not None:
            return self.batch
        if changes <= FEWEST_RUNS:
            return FEWEST_RUNS
        return runs_at_once(self.run, self.dtype)

    def observed(self, changes: Sequence[WeightChange]) -> ObservedStates:
        """The observed states of one stack; none before its first changed step."""
        first_changed = min(change.first(self.run) for change in changes)
        start = max(state for state in self.run.kept if state <= first_changed)
        before = self.run.state(start, dtype=self.dtype)
        like = next(iter(before.params.values()))
        runs = len(changes) + 2

        def weights(step: int) -> Tensor:
            changed = [change.weights(self.run, step) for change in changes]
            unperturbed = torch.ones_like(changed[0])
            return torch.stack([unperturbed, *changed, unperturbed]).to(like)

        states = rerun(
            lambda step: self.run.transition(step, self.dtype),
            before.repeat(runs),
            weights,
            start=start,
            stop=max(self.observed_at),
            trained=autocast_gradients(self.run, start),
        )
        average = self._average_at(start)
        stacked_average = None if average is None else average.repeat(runs)
        checked = self._checked(states, start)
        for number, state in read_states(self.queries, checked, stacked_average):
            if number in self.observed_at:
                yield number, state

    def unchanged(self, number: int) -> State:
        """What the queries read at a state of the recorded training: the state, or an average."""
        average = self._average_at(number)
        if average is not None:
            return average
        return self.run.state(number, replay=True, dtype=self.dtype)

    def _checked(self, states: ObservedStates, start: int) -> ObservedStates:
        """Compare the unperturbed run with the recorded training at every kept state.

        Raises:
            StrayedRerun: it is another training.
        """
        begun = self.run.state(start)
        before = start
        for number, stack in states:
            if number in self.run.kept and not self.remarks:
                recorded = self.run.state(number)
                first = State(select_run(stack.params, 0))
                away = _distance(first, recorded) / max(
                    _distance(recorded, begun), UNMOVED * norm(recorded.params)
                )
                # Written as `not <=`, so that NaN is looked at too.
                if not away <= STRAYED:
                    self._explain(before, number, away)
                before = number
            yield number, stack

    def _explain(self, before: int, number: int, away: float) -> None:
        """Find out why the unperturbed run left the training between two kept states.

        At the recorded states nothing has had the time to grow, so a gradient that differs there
        by more than rounding was computed from something else. If none does, rounding has grown.

        Raises:
            StrayedRerun: a step has another gradient.
        """
        dtype = self.dtype or self.run.task.dtype
        for index, state in self.run.walk(before, number - 1):
            recorded, *_ = self.run.transition(index).raw_gradient(state)
            again, *_ = self.run.transition(index, dtype).raw_gradient(
                state.cast(dtype), autocast=False
            )
            gap = norm({name: tensor.double() - recorded[name] for name, tensor in again.items()})
            off = gap / max(norm(recorded), TINY)
            tolerance = OTHER_GRADIENT
            if self.run.step(index).autocast:
                tolerance = 2 * AUTOCAST
            if not off <= tolerance:
                raise StrayedRerun(index, number, off=off, tolerance=tolerance, dtype=str(dtype))
        self.remarks.append(
            f"the unperturbed re-run in {dtype} ends up {away:.1g} of the way away from the "
            f"recorded training, first at state {number}: every single gradient agrees, but "
            "differences in rounding grow over the steps (a chaotic training). Removals are "
            "compared with that re-run, not with the recorded training"
        )
        log.warning("%s", self.remarks[-1])

    def _average_at(self, number: int) -> State | None:
        """The recorded training's average at a state, which the runs continue; None without one."""
        if not isinstance(self.queries, Averaged):
            return None
        recorded = self.run.walk(min(self.queries.start, number), number, self.dtype)
        *_, (_, average) = read_states(self.queries, recorded)
        return average


def _distance(left: State, right: State) -> float:
    gaps: Tree = {}
    for name, tensor in left.params.items():
        gaps[name] = tensor.double() - right.params[name]
    return norm(gaps)


def autocast_gradients(run: Run, start: int) -> Iterator[tuple[Tree, Tree]] | None:
    """Gradients and buffers of the recorded training, for a run under autocast; otherwise None.

    Re-runs do without autocast. They stay near the recorded training if the unperturbed one of them
    takes its gradients, step by step, and the others keep their distance from it.
    """
    if any(step.autocast for step in run.log):
        return recorded_gradients(run, start)
    return None


def recorded_gradients(run: Run, start: int) -> Iterator[tuple[Tree, Tree]]:
    """Gradient before clipping and buffers after each step from `start` on, as in the training."""
    state = run.state(start, replay=True)
    for step in range(start, run.steps):
        transition = run.transition(step)
        grads, buffers, _ = transition.raw_gradient(state)
        yield grads, buffers
        if step + 1 in run.kept:
            state = run.state(step + 1)
        else:
            state = transition.apply_update(state, transition.clip(grads), buffers)


def runs_at_once(run: Run, dtype: torch.dtype | None) -> int:
    """How many runs share a stack: fewer on a processor where their activations leave its caches.

    Args:
        run: the recorded training.
        dtype: precision of the runs; None for the recorded one.
    """
    if run.task.device.type != "cpu":
        return MOST_RUNS
    size = bytes_of_activations(run, twice=False)
    if dtype is not None:
        size = size * dtype.itemsize // run.task.dtype.itemsize
    return max(FEWEST_RUNS, min(MOST_RUNS, ACTIVATION_BYTES // max(size, 1)))
