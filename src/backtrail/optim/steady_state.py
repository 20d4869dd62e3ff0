r"""The response of an update to a lasting change of the gradient, one number per entry.

Data Value Embedding needs a step in the form :math:`\theta' = \rho\,\theta - D\,g`, with one D and
one :math:`\rho` for every entry. Optimizers respond on two time scales. The first moment m follows
a lasting change of the gradient within a few steps, to
:math:`\frac{\partial m'}{\partial g} / (1 - \frac{\partial m'}{\partial m})` of it, and is taken to
be in that steady state at once. What a step is divided by (second moments) is held constant. So D
is :math:`\eta` for SGD, :math:`\eta / (1 - \mu)` with momentum and
:math:`\eta / (\sqrt{\hat v} + \epsilon)` for Adam; no formula of an optimizer is written down here,
all comes from its derivative. :math:`\rho` is the same for a lasting change of the parameter, which
weight decay shrinks.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.func import grad, vjp

from backtrail.optim.flatten import FlatChunk, flat_chunks
from backtrail.optim.jacobian import GRADIENT, PARAMETER, Diagonals, jacobian
from backtrail.step.optimizers import rule_named
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.task.task import Task
from backtrail.tree import Tree, each


@final
@dataclass(frozen=True, slots=True)
class SteadyState:
    r"""The response of one step to lasting changes, entry by entry.

    Attributes:
        rate: D, how far a lasting unit of the raw gradient moves the parameter, downwards.
        decay: :math:`\rho`, the part of a change of the parameter that is left after the step if
            the samples' gradients do not change.
    """

    rate: Tree
    decay: Tree

    def __or__(self, other: "SteadyState") -> "SteadyState":
        """Join the responses of different parameters."""
        return SteadyState(self.rate | other.rate, self.decay | other.decay)


def steady_state(task: Task, update: Update, state: State, *, grads: Tree) -> SteadyState:
    """Compute the response of a step to lasting changes.

    The second derivative of the task's penalty is treated as diagonal, which it is for sums over
    the entries.

    Args:
        task: Of the training.
        update: Of the step.
        state: Before the step.
        grads: The step's gradient before clipping; of all parameters, or of some if the task does
            not clip.
    """
    # Clipping depends on the norm of the whole gradient, so it comes first.
    clipped = grads if task.clip is None else task.clip(grads)
    state = _with_all_moments(update, state, clipped)
    rule = rule_named(update.optimizer)
    rate = each(torch.empty_like, grads)
    decay = each(torch.empty_like, grads)
    for chunk in flat_chunks(update, state, clipped):
        # A linear update has the same derivative everywhere, so one entry stands for all.
        some = _first_entry(chunk) if rule.linear else chunk
        diagonals = jacobian(update, state, clipped, chunk=some, held=rule.divisors)
        by_gradient = _settled(diagonals, GRADIENT, rule.first_moments)
        by_parameter = _settled(diagonals, PARAMETER, rule.first_moments)
        for part, place in chunk.parts():
            found = slice(None) if rule.linear else place
            rate[part.name].view(-1)[part.start : part.stop] = -by_gradient[found]
            decay[part.name].view(-1)[part.start : part.stop] = by_parameter[found]
    # D refers to the raw gradient: chain rule through the diagonal of the clipping Jacobian.
    if task.clip is not None:
        slopes = task.clip.diagonal(grads)
        rate = {name: rate[name] * slopes[name] for name in slopes}
    # The penalty's gradient is part of g: D times its second derivative is taken off rho.
    for name, curvature in _penalty_diagonal(task, state, grads).items():
        decay[name] = decay[name] - rate[name] * curvature
    return SteadyState(rate, decay)


def _first_entry(chunk: FlatChunk) -> FlatChunk:
    first = chunk.slices[0]
    return FlatChunk(chunk.group, (replace(first, stop=first.start + 1),))


def _with_all_moments(update: Update, state: State, grads: Tree) -> State:
    """Add the moments that the optimizer makes in its first step.

    Only moments that are there before a step are inputs of its derivative.
    """
    fresh = {name: grads[name] for name in grads if not state.moments.get(name)}
    if not fresh:
        return state
    rule = rule_named(update.optimizer)
    after = update(state, fresh).moments
    start: dict[str, Tree] = {}
    for members, settings in zip(update.groups, update.settings, strict=True):
        for name in members:
            if name in fresh:
                start[name] = rule.start(after[name], settings)
    return replace(state, moments=state.moments | start)


def _settled(diagonals: Diagonals, source: str, first_moments: frozenset[str]) -> Tensor:
    r"""Derivative of the parameter after the step by a lasting change of an input x.

    .. math:: \frac{\partial \theta'}{\partial x} + \sum_m \frac{\partial \theta'}{\partial m}
        \frac{\partial m' / \partial x}{1 - \partial m' / \partial m}
    """
    like = diagonals[PARAMETER, PARAMETER]
    total = diagonals.get((PARAMETER, source), torch.zeros_like(like))
    for key in sorted(first_moments):
        if (PARAMETER, key) in diagonals and (key, source) in diagonals:
            settled = diagonals[key, source] / (1 - diagonals[key, key])
            total = total + diagonals[PARAMETER, key] * settled
    return total


def _penalty_diagonal(task: Task, state: State, grads: Tree) -> Tree:
    """Compute the row sums of the penalty's second derivative: its diagonal, if it is diagonal."""
    penalty = task.penalty
    if penalty is None:
        return {}
    params = {name: state.params[name] for name in grads}

    def gradient(part: Tree) -> Tree:
        found: Tree = grad(lambda some: penalty(state.params | some))(part)
        return found

    pull = vjp(gradient, params)[1]
    # The second derivative is symmetric, so its VJP with ones gives the row sums.
    row_sums: Tree = pull(each(torch.ones_like, params))[0]
    return row_sums
