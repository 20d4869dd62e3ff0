"""The order in which states are restored, recomputed and held to reverse a run: a schedule as data.

A step can be reversed only from the state before it, but a run keeps few states. The others are
recomputed from the nearest kept one, and a few of those are held in memory meanwhile. The schedule
below recomputes as few steps as possible (Griewank and Walther, "Algorithm 799: revolve", 2000). An
executor is this short::

    for action in plan(kept, stop, held=8):
        match action:
            case Restore(step):
                state = memory[step] if step in memory else load(step)
            case Advance(start, stop):
                state = memory[stop] = run_forward(state, start, stop)
            case Reverse(step):
                cotangent = pull_back(state, step, cotangent)
                memory.pop(step, None)

Every Advance holds the state it ends at, and every Reverse frees its state. So `held` is the most
that `memory` ever contains, the current state included. A kept state is not in `memory`: it comes
from disk at a moment when `memory` is empty, and the Advance that follows replaces it, or the
Reverse frees it. What one step needs while it is computed (its input beside its output, its graph)
is not counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import comb
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Restore:
    """Make the state before `step` the current one, from memory or from disk."""

    step: int


@final
@dataclass(frozen=True, slots=True)
class Advance:
    """Run the steps start ... stop - 1 from the current state, and hold the state before `stop`."""

    start: int
    stop: int


@final
@dataclass(frozen=True, slots=True)
class Reverse:
    """Pull back through `step`, which starts at the current state, and free that state."""

    step: int


Action = Restore | Advance | Reverse


def plan(kept: Sequence[int], stop: int, *, held: int) -> Iterator[Action]:
    """Reverse the steps stop - 1 ... min(kept), each from the nearest kept state before it.

    Args:
        kept: Steps whose state is on disk, in any order; those from `stop` on are not used.
        stop: The step after the last one to reverse.
        held: How many states may be in memory at once, at least 1.

    >>> for action in plan([0, 2], 4, held=1):
    ...     print(action)
    Restore(step=2)
    Advance(start=2, stop=3)
    Reverse(step=3)
    Restore(step=2)
    Reverse(step=2)
    Restore(step=0)
    Advance(start=0, stop=1)
    Reverse(step=1)
    Restore(step=0)
    Reverse(step=0)
    """
    for start in sorted(kept, reverse=True):
        yield from reverse_segment(start, stop, held=held)
        stop = min(start, stop)


def reverse_segment(start: int, stop: int, *, held: int) -> Iterator[Action]:
    r"""Reverse the steps stop - 1 ... start of one segment, of which only the first state is kept.

    With s states free, and no step recomputed more than r times, at most :math:`\binom{s + r}{s}`
    steps can be reversed. Each segment is split where both parts still can be reversed: the right
    part has one free state less, the left part one repeat less. Every such split costs the minimum;
    the one with the longest left part is taken.

    >>> [action.step for action in reverse_segment(5, 9, held=2) if isinstance(action, Reverse)]
    [8, 7, 6, 5]
    """
    assert held >= 1, f"Reversing needs at least one state in memory, not {held}."
    # States to come back to, the latest last, and how often steps after them may be recomputed.
    waiting = [(start, _repeats(stop - start, held))]
    while start < stop:
        state, repeats = waiting.pop()
        yield Restore(state)
        while state + 1 < stop:
            free = held - len(waiting)
            longest_left = comb(free + repeats - 1, free)
            shortest_right = comb(free + repeats - 2, free - 1)
            length = min(longest_left, stop - state - shortest_right)
            waiting.append((state, repeats - 1))
            yield Advance(state, state + length)
            state += length
        yield Reverse(state)
        stop = state


def forward_steps(length: int, *, held: int) -> int:
    r"""Count the steps that reversing a segment of `length` steps recomputes.

    .. math:: r n - \binom{h + r}{h + 1}, \quad r = \min \{ r : \binom{h + r}{h} \ge n \}

    for n steps with h states held. The forward pass of the step inside each Reverse is not counted.

    >>> [forward_steps(100, held=held) for held in (1, 2, 8, 99)]
    [4950, 845, 245, 99]
    """
    repeats = _repeats(length, held)
    return repeats * length - comb(held + repeats, held + 1)


def _repeats(length: int, held: int) -> int:
    """Count how often the most recomputed step of a segment has to be."""
    return next(repeats for repeats in count() if comb(held + repeats, held) >= length)
