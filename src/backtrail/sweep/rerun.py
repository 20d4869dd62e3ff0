"""Re-running a training with changed sample weights, many runs at once."""

import logging
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from backtrail.errors import BacktrailError
from backtrail.step.state import State
from backtrail.step.step import Transition, gathered
from backtrail.tree import Tree, each, stack

log = logging.getLogger(__name__)
Weights = Callable[[int], Float[Tensor, "run slot"]]


def rerun(
    transition: Callable[[int], Transition],
    states: State,
    weights: Weights,
    *,
    start: int,
    stop: int,
    trained: Iterator[tuple[Tree, Tree]] | None = None,
) -> Iterator[tuple[int, State]]:
    """Advance a stack of equal states through the steps [start, stop), each run with its own sample weights.

    All runs of a stack share every kernel, so their differences carry no trace of the order of
    summation.

    Args:
        transition: a step, by index.
        states: the state before `start`, `State.repeat`ed.
        weights: weights of a step's slots, `[run, slot]`; 1 as it happened, 0 removed.
        start: first step.
        stop: the step after the last.
        trained: gradients before clipping, and buffers after the step, that the first run of the
            stack must have, step by step; the others keep their distance from it. So what a
            training's low precision added stays as it was.

    Yields:
        The number of every state from start + 1 to stop, and the stack of states there.

    Raises:
        BacktrailError: The task or a query is wrong, whichever way it is computed.
    """
    one_by_one = False
    for index in range(start, stop):
        step, w = transition(index), weights(index)
        if not one_by_one:
            try:
                grads, buffers = step.gradients_of_many(states, w)
            except BacktrailError:  # says what is wrong, whether in a batch or one by one
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                log.warning(
                    "this model cannot be re-run in batches (%s); re-running one by one",
                    _first_line(error),
                )
                one_by_one = True
        if one_by_one:
            grads, buffers = gradients_of_each(step, states, w)
        if trained is not None:
            grads, buffers = (
                _beside(s, first) for s, first in zip((grads, buffers), next(trained), strict=True)
            )
        states = step.moved_many(states, grads, buffers)
        yield index + 1, states


def _beside(stacked: Tree, first: Tree) -> Tree:
    """Move a whole stack by what its first member lacks to the given one."""
    return {name: tensor + (first[name].to(tensor) - tensor[0]) for name, tensor in stacked.items()}


def gradients_of_each(step: Transition, states: State, weights: Tensor) -> tuple[Tree, Tree]:
    """The same as `Transition.gradients_of_many`, one run after the other."""
    grads, buffers = [], []
    for run, w in enumerate(weights):
        with step.replaying():
            walked = list(
                step.walk(State(select(states.params, run), select(states.buffers, run)), w)
            )
        grads.append(gathered(walked)[0])
        buffers.append(walked[-1][1][1])
    return stack(grads), stack(buffers)


def select(tree: Tree, run: int) -> Tree:
    """One run's tensors out of a stack."""
    return each(lambda tensor: tensor[run], tree)


def each_run(states: State, function: Callable[[Tree, Tree], Tensor]) -> Float[Tensor, "run ..."]:
    """Read numbers off every state of a stack, at once where the model allows it.

    Raises:
        BacktrailError: The task or a query is wrong, whichever way it is computed.
    """
    with torch.no_grad():
        try:
            found: Tensor = vmap(function)(states.params, states.buffers)
            return found
        except BacktrailError:  # says what is wrong, whether in a batch or one by one
            raise
        except (RuntimeError, NotImplementedError, ValueError):
            runs = range(len(next(iter(states.params.values()))))
            return torch.stack(
                [function(select(states.params, r), select(states.buffers, r)) for r in runs]
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
