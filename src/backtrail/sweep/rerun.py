r"""Re-running a training with changed sample weights, many runs at once.

With the weights :math:`w^{(k)}` of run k, every run goes through the recorded steps as the training
did:

.. math:: (\theta, m)^{(k)} \leftarrow
    U_t\big(\theta^{(k)}, m^{(k)}, \nabla L_t(\theta^{(k)}; w^{(k)})\big)
"""

import logging
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from backtrail.errors import BacktrailError
from backtrail.step.state import State
from backtrail.step.step import Transition, accumulate
from backtrail.tree import Tree, each, norm, precision_of, stack

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
    """Advance a stack of equal states, each with its own slot weights, from `start` to `stop`.

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
        step = transition(index)
        step_weights = weights(index)
        if not one_by_one:
            try:
                grads, buffers = step.gradients_of_stack(states, step_weights)
            except BacktrailError:
                # It says what is wrong, and would be raised one by one as well.
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                log.warning(
                    "this model cannot be re-run in batches (%s); re-running one by one",
                    _first_line(error),
                )
                one_by_one = True
            else:
                # Under `vmap` a few operations draw other numbers from the same generator.
                if index == start and not _agrees_with_first(step, states, step_weights, grads):
                    log.warning("other random numbers are drawn in batches; re-running one by one")
                    one_by_one = True
        if one_by_one:
            grads, buffers = gradients_one_by_one(step, states, step_weights)
        if trained is not None:
            first_grads, first_buffers = next(trained)
            grads = _moved_to_first(grads, first_grads)
            buffers = _moved_to_first(buffers, first_buffers)
        states = step.apply_update_to_stack(states, grads, buffers)
        yield index + 1, states


def _agrees_with_first(
    step: Transition, states: State, weights: Float[Tensor, "run slot"], grads: Tree
) -> bool:
    """Whether the first run's gradient is the one that it has alone; looked at if it has noise."""
    if not any(fed.random for fed in step.step.fed):
        return True
    first = State(each(_first, states.params), each(_first, states.buffers))
    alone, _ = gradients_one_by_one(step, first, weights[:1])
    gap = norm({name: tensor[0] - alone[name][0] for name, tensor in grads.items()})
    allowed: float = torch.finfo(precision_of(grads)).eps ** 0.5
    return gap <= allowed * norm(alone)


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1]


def _moved_to_first(stacked: Tree, first: Tree) -> Tree:
    """Shift a stack so that its first member becomes the given one, and the differences stay."""
    shifted: Tree = {}
    for name, tensor in stacked.items():
        shifted[name] = tensor + (first[name].to(tensor) - tensor[0])
    return shifted


def gradients_one_by_one(
    step: Transition, states: State, weights: Float[Tensor, "run slot"]
) -> tuple[Tree, Tree]:
    """Compute the same as `Transition.gradients_of_stack` without `vmap`, one run after another."""
    grads: list[Tree] = []
    buffers: list[Tree] = []
    for run, run_weights in enumerate(weights):
        state = State(select_run(states.params, run), select_run(states.buffers, run))
        with step.replaying():
            results = step.micro_batch_gradients(state, run_weights)
            total = accumulate(result for _, result in results)
        grads.append(total.gradient)
        buffers.append(total.buffers)
    return stack(grads), stack(buffers)


def select_run(tree: Tree, run: int) -> Tree:
    """One run's tensors out of a stack `[run, ...]`."""
    return each(lambda tensor: tensor[run], tree)


def evaluate_runs(
    states: State, function: Callable[[Tree, Tree], Tensor]
) -> Float[Tensor, "run ..."]:
    """Apply a function of parameters and buffers to every state of a stack.

    At once under `vmap`, or one by one where the model does not allow that.

    Raises:
        BacktrailError: The task or a query is wrong, whichever way it is computed.
    """
    try:
        with torch.no_grad():
            # Whatever a function draws, every run gets the same numbers.
            at_once: Tensor = vmap(function, randomness="same")(states.params, states.buffers)
            return at_once
    except BacktrailError:
        # It says what is wrong, and would be raised one by one as well.
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        log.info("states are read one by one: %s", _first_line(error))
    values: list[Tensor] = []
    for run in range(len(next(iter(states.params.values())))):
        params = select_run(states.params, run)
        buffers = select_run(states.buffers, run)
        values.append(_evaluate(function, params, buffers))
    return torch.stack(values)


def _evaluate(function: Callable[[Tree, Tree], Tensor], params: Tree, buffers: Tree) -> Tensor:
    try:
        with torch.no_grad():
            return function(params, buffers)
    except BacktrailError:
        raise
    except RuntimeError:
        # A model that differentiates by its own inputs needs a graph.
        with torch.enable_grad():
            return function(params, buffers).detach()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
