"""The schedule reverses each step once, within its memory, and recomputes as little as possible."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, pairwise

import pytest
from checkpoint_schedules import EndReverse, Forward, MultistageCheckpointSchedule
from checkpoint_schedules.multistage import optimal_steps_binomial
from hypothesis import given
from hypothesis import strategies as st

from backtrail.sweep.schedule import (
    Action,
    Advance,
    Restore,
    Reverse,
    forward_steps,
    plan,
    reverse_segment,
)

HELD = (1, 2, 3, 5, 8, 13, 32, 250)


@dataclass
class Executor:
    """Carries out a plan on a state that is just the number of steps taken."""

    disk: set[int]
    memory: dict[int, int] = field(default_factory=dict)
    in_hand: int = -1
    most_held: int = 0
    forward: int = 0
    reversed: list[int] = field(default_factory=list)

    def run(self, actions: Iterable[Action]) -> "Executor":
        """Carry out every action, checking that each is possible."""
        for action in actions:
            self.act(action)
            self.most_held = max(
                self.most_held, len(self.memory) + (self.in_hand not in self.memory)
            )
        return self

    def act(self, action: Action) -> None:
        """Carry out one action."""
        match action:
            case Restore(step):
                assert step in self.memory or (step in self.disk and not self.memory)
                self.in_hand = self.memory.get(step, step)
            case Advance(start, stop):
                assert self.in_hand == start < stop
                self.forward += stop - start
                self.in_hand = self.memory[stop] = stop
            case Reverse(step):
                assert self.in_hand == step
                self.reversed.append(step)
                self.memory.pop(step, None)


@cache
def fewest_by_recursion(length: int, held: int) -> int | float:
    """Try every first split of a segment: advance to it, reverse the right part, then the left."""
    if length <= 1:
        return 0
    if held == 0:
        return float("inf")
    return min(
        ahead + fewest_by_recursion(length - ahead, held - 1) + fewest_by_recursion(ahead, held)
        for ahead in range(1, length)
    )


def fewest_by_search(length: int, held: int) -> int:
    """Search everything one could do with at most `held` states in memory and state 0 on disk."""
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, length, ())]
    seen = set()
    while True:
        cost, left, memory = heapq.heappop(queue)
        if left == 0:
            return cost
        if (left, memory) in seen:
            continue
        seen.add((left, memory))
        options = [(cost, left - (left - 1 in memory), memory), (cost, left, (*memory, 0))]
        options += [(cost, left, tuple(s for s in memory if s != gone)) for gone in memory]
        options += [(cost + 1, left, (*memory, s + 1)) for s in memory]
        options += [(cost + 1, left, (*(set(memory) - {s}), s + 1)) for s in memory]
        for cost_then, left_then, states in options:
            if len(set(states)) <= held:
                heapq.heappush(queue, (cost_then, left_then, tuple(sorted(set(states)))))


@pytest.mark.parametrize("held", HELD)
def test_every_length_is_reversed_with_the_fewest_steps(held: int) -> None:
    """Segments up to 200 steps are reversed in order, within memory, at the recursion's optimum."""
    for length in range(201):
        done = Executor(disk={7}).run(reverse_segment(7, 7 + length, held=held))
        assert done.reversed == list(range(7, 7 + length))[::-1]
        assert done.most_held <= held
        assert done.memory == {}
        assert done.forward == forward_steps(length, held=held)
        assert done.forward == fewest_by_recursion(length, held)


@pytest.mark.parametrize("held", [1, 2, 3, 4])
@pytest.mark.parametrize("length", range(1, 8))
def test_no_other_order_needs_fewer_steps(length: int, held: int) -> None:
    """An exhaustive search that knows nothing of splits finds no cheaper way."""
    assert forward_steps(length, held=held) == fewest_by_search(length, held)


@pytest.mark.parametrize(
    ("length", "held"), [(100_000, 8), (100_000, 32), (100_000, 1000), (20_000, 2)]
)
def test_long_segments_meet_the_closed_form(length: int, held: int) -> None:
    """Long segments too stay within memory and cost exactly what the closed form says."""
    done = Executor(disk={0}).run(reverse_segment(0, length, held=held))
    assert done.reversed == list(range(length))[::-1]
    assert done.most_held <= held
    assert done.forward == forward_steps(length, held=held)


def test_the_plan_is_lazy() -> None:
    """The first actions of a plan that could never be listed come at once."""
    first = list(islice(reverse_segment(0, 10**12, held=50), 100))
    assert first[0] == Restore(0)
    assert any(isinstance(action, Reverse) for action in first)


@pytest.mark.parametrize("held", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("length", [2, 3, 10, 57, 200, 400])
def test_the_published_schedule_costs_the_same(length: int, held: int) -> None:
    """checkpoint_schedules also counts the forward pass of each reversed step."""
    schedule = MultistageCheckpointSchedule(length, held, 0)
    theirs = 0
    for action in schedule:
        if isinstance(action, EndReverse):
            break
        if isinstance(action, Forward):
            theirs += action.n1 - action.n0
    assert theirs == optimal_steps_binomial(length, held)
    assert theirs - length == forward_steps(length, held=held)


@given(kept=st.sets(st.integers(0, 120)), stop=st.integers(0, 140), held=st.integers(1, 9))
def test_a_run_is_reversed_from_its_kept_states(kept: set[int], stop: int, held: int) -> None:
    """A plan reverses all steps that have a kept state before them, at the cost of its segments."""
    done = Executor(disk=kept).run(plan(list(kept), stop, held=held))
    assert done.reversed == list(range(min(kept, default=stop), stop))[::-1]
    assert done.most_held <= held
    edges = [*sorted(k for k in kept if k < stop), stop]
    assert done.forward == sum(forward_steps(b - a, held=held) for a, b in pairwise(edges))


def test_keeping_every_state_recomputes_nothing() -> None:
    """With all states on disk the plan only restores and reverses."""
    actions = list(plan(range(4), 4, held=1))
    assert actions == [action for t in (3, 2, 1, 0) for action in (Restore(t), Reverse(t))]


def test_holding_nothing_is_refused() -> None:
    """Without a state in memory nothing can be reversed, and the schedule does not loop forever."""
    with pytest.raises(AssertionError, match="not 0"):
        next(reverse_segment(0, 3, held=0))
