"""Run, queries, states and samples as public functions take them, and the queries' gradients."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from backtrail import arguments
from backtrail.errors import BadSetting, NeverTrainedOn, NoSuchState
from backtrail.influence.tables import places
from backtrail.queries import Query, gradients
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.trajectory import Trajectory
from backtrail.tree import Tree

ObservedAt = Literal["end", "epochs"] | int | Sequence[int]


def check_run(run: object) -> None:
    """Check that an argument is a recorded run.

    Raises:
        BadSetting: It is something else.
    """
    arguments.instance("run", run, Run, "a run, as backtrail.open_run returns it")


def check_queries(queries: object) -> None:
    """Check that an argument is a set of queries.

    Raises:
        BadSetting: It is something else.
    """
    arguments.instance("queries", queries, Query, "queries, such as a backtrail.Loss")  # type: ignore[type-abstract]


def observed_states(run: Run, observed_at: ObservedAt) -> tuple[int, ...]:
    """List the observed states in order: "end" is T, "epochs" the end of every epoch.

    State 0 cannot be observed: no step comes before it, so it has no influence.

    Raises:
        BadSetting: Something else, no state, or state 0.
        NoSuchState: A number that the run does not have.
    """
    if isinstance(observed_at, str):
        also = "one or more numbers of states"
        if arguments.choice("observed_at", observed_at, ("end", "epochs"), also) == "end":
            return (run.steps,)
        return run.epochs
    expected = f"'end', 'epochs', or one or more numbers of states, from 1 to {run.steps}"
    number = arguments.as_whole(observed_at)
    if number is None:
        states = arguments.whole_numbers("observed_at", observed_at, least=None, expected=expected)
    else:
        states = [number]
    if 0 in states:
        reason = f"{expected} (no step comes before state 0, so it has no influence)"
        raise BadSetting("observed_at", observed_at, reason)
    for state in states:
        if not 0 < state <= run.steps:
            raise NoSuchState(state, run.steps, "state")
    return tuple(sorted(set(states)))


def trained_samples(run: Run, samples: object, name: str = "samples") -> list[int]:
    """Samples of a run, each of which was in some batch.

    Args:
        run: The recorded training.
        samples: Their numbers.
        name: Name of the argument.

    Raises:
        BadSetting: They are not one or more whole numbers.
        UnknownSample: A sample that the training set does not have.
        UnknownId: A sample that the training did not see, where samples have ids of their own.
        NeverTrainedOn: A sample that was in no batch.
    """
    numbers = arguments.whole_numbers(
        name, samples, least=None, expected="one or more numbers of samples"
    )
    places(run.ids, numbers)  # refuses unknown samples
    unseen = np.setdiff1d(numbers, run.seen)
    if len(unseen):
        raise NeverTrainedOn(unseen.tolist(), len(run.seen))
    return numbers


def query_gradients(run: Trajectory, queries: Query, state: State) -> tuple[Tree, Tree]:
    """Gradients `[query, ...]` by the trained parameters and by the running statistics."""
    _, params, buffers = gradients(
        queries, run.task, params=state.params, buffers=state.buffers, trained=run.trained
    )
    return params, buffers
