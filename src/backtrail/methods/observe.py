"""The states that the queries of an attribution read, and the queries' gradients there."""

from collections.abc import Sequence
from typing import Literal

from backtrail.errors import NoSuchState
from backtrail.queries import Query, gradients
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.tree import Tree

ObservedAt = Literal["end", "epochs"] | int | Sequence[int]


def observed_states(run: Run, observed_at: ObservedAt) -> tuple[int, ...]:
    """List the observed states in order: "end" is T, "epochs" the end of every epoch.

    State 0 is left out, since all influence on it is zero. If nothing else is asked for, it is
    replaced by the end.

    Raises:
        NoSuchState: A number that the run does not have.
    """
    match observed_at:
        case "end":
            states: Sequence[int] = [run.steps]
        case "epochs":
            states = run.epochs
        case int():
            states = [observed_at]
        case _:
            states = observed_at
    for state in states:
        if not 0 <= state <= run.steps:
            raise NoSuchState(state, run.steps, "state")
    observed = {int(state) for state in states} - {0}
    return tuple(sorted(observed)) or (run.steps,)


def query_gradients(run: Run, queries: Query, state: State) -> tuple[Tree, Tree]:
    """Gradients `[query, ...]` by the trained parameters and by the running statistics."""
    _, params, buffers = gradients(
        queries, run.task, params=state.params, buffers=state.buffers, trained=run.trained
    )
    return params, buffers
