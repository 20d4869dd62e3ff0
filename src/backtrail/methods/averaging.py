"""What queries read along a training: the states, or their running average."""

from collections.abc import Iterable, Iterator

import torch

from backtrail.queries import Averaged, Query
from backtrail.step.state import State
from backtrail.tree import Tree


def as_read(
    query: Query, states: Iterable[tuple[int, State]], before: State | None = None
) -> Iterator[tuple[int, State]]:
    r"""What a query reads at each of the consecutive states: the state itself, or the average so far.

    .. math:: \bar\theta_t = \bar\theta_{t-1} + r_t (\theta_t - \bar\theta_{t-1})

    with :math:`r_t` the share of a state in the average at this very state.

    Args:
        query: any query.
        states: numbers and states, or stacks of them.
        before: the average just before the first of them; needed where that one is later than the
            average's start.
    """
    for number, state in states:
        if not isinstance(query, Averaged):
            yield number, state
            continue
        if before is None or number <= query.start:
            before = State(state.params, state.buffers)
        else:
            before = _entered(query, before, state, rate=query.share(number, number))
        yield number, before


def _entered(query: Averaged, average: State, state: State, *, rate: float) -> State:
    averaged = {
        name: tensor for name, tensor in state.buffers.items() if tensor.is_floating_point()
    }
    buffers = _towards(average.buffers, averaged, rate) if query.use_buffers else {}
    return State(_towards(average.params, state.params, rate), state.buffers | buffers)


def _towards(old: Tree, new: Tree, rate: float) -> Tree:
    return {name: torch.lerp(old[name], tensor, rate) for name, tensor in new.items()}
