"""What queries read along a training: the states, or their running average."""

from collections.abc import Iterable, Iterator

import torch

from backtrail.queries import Averaged, Query
from backtrail.step.state import State
from backtrail.tree import Tree


def read_states(
    query: Query, states: Iterable[tuple[int, State]], before: State | None = None
) -> Iterator[tuple[int, State]]:
    r"""Yield what a query reads at consecutive states: the state itself, or the average so far.

    .. math:: \bar\theta_t = \bar\theta_{t-1} + r_t (\theta_t - \bar\theta_{t-1})

    with :math:`r_t` the share of a state in the average at this very state.

    Args:
        query: Any query.
        states: Numbers and states, or stacks of states.
        before: The average just before the first of them; needed if that is later than the
            average's start.
    """
    if not isinstance(query, Averaged):
        yield from states
        return
    average = before
    for number, state in states:
        # The average starts as a copy of the state.
        if average is None or number <= query.start:
            average = State(state.params, state.buffers)
        else:
            average = _updated(query, average, state, rate=query.share(number, number))
        yield number, average


def _updated(query: Averaged, average: State, state: State, *, rate: float) -> State:
    """Move the average towards a state; buffers that are not averaged are those of the state."""
    params = _towards(average.params, state.params, rate)
    buffers = dict(state.buffers)
    if query.use_buffers:
        # Integers, like BatchNorm's number of batches, are not averaged.
        floating = {name: b for name, b in state.buffers.items() if b.is_floating_point()}
        buffers |= _towards(average.buffers, floating, rate)
    return State(params, buffers)


def _towards(old: Tree, new: Tree, rate: float) -> Tree:
    return {name: torch.lerp(old[name], tensor, rate) for name, tensor in new.items()}
