r"""What an optimizer makes of a change of the gradient that lasts: one number per entry, for recursions over steps.

Data Value Embedding wants a step as :math:`\theta' = \rho\,\theta - D\,g`. Optimizers answer on two
time scales. The first moment m follows a lasting change of the gradient within a few steps, to
:math:`\frac{\partial m' / \partial g}{1
- \partial m' / \partial m}` of it, and is taken to be there at once. What a step is divided by
(second moments) counts as fixed. So D is :math:`\eta` for SGD, :math:`\eta / (1 - \mu)` with
momentum and :math:`\eta / (\sqrt{\hat v} + \epsilon)` for Adam; but no formula of an optimizer is
written down here, all comes from its derivative. :math:`\rho` is the same for a change of the
parameter itself, which weight decay shrinks.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.func import grad, vjp

from backtrail.optim.flatten import FlatChunk, flat_chunks
from backtrail.optim.jacobian import GRADIENT, PARAMETER, SECOND_MOMENTS, Entries, jacobian
from backtrail.step.state import State
from backtrail.step.update import LINEAR, Update
from backtrail.task.task import Task
from backtrail.tree import Tree, each

FOLLOWING = ("exp_avg", "momentum_buffer")  # moments that a step goes along
FIXED = SECOND_MOMENTS | {"grad_avg"}  # moments that it is divided by


@final
@dataclass(frozen=True, slots=True)
class Lasting:
    """One step, entry by entry.

    Attributes:
        rate: D, how far a lasting unit of the raw gradient moves the parameter, downwards.
        decay: what a step leaves of a parameter's change where the samples' gradients do not
            change.
    """

    rate: Tree
    decay: Tree

    def __or__(self, other: "Lasting") -> "Lasting":
        """Those of both, of different parameters."""
        return Lasting(self.rate | other.rate, self.decay | other.decay)


def lasting(task: Task, update: Update, state: State, *, grads: Tree) -> Lasting:
    """What a step makes of lasting changes.

    The penalty's curvature counts as if it were diagonal, which it is for sums over the entries.

    Args:
        task: of the training.
        update: the step's.
        state: the state before it.
        grads: its gradient before clipping, whole, or of some parameters if nothing is clipped.
    """
    clipped = grads if task.clip is None else task.clip(grads)
    state = _begun(update, state, clipped)
    rate, decay = (each(torch.empty_like, grads) for _ in range(2))
    for chunk in flat_chunks(update, state, clipped):
        alike = update.optimizer in LINEAR  # one entry tells all
        some = _first_entry(chunk) if alike else chunk
        entries = jacobian(update, state, clipped, chunk=some, held=FIXED)
        moved = {source: _lasting(entries, source) for source in (GRADIENT, PARAMETER)}
        for span, place in chunk.parts():
            part = slice(None) if alike else place
            rate[span.name].view(-1)[span.start : span.stop] = -moved[GRADIENT][part]
            decay[span.name].view(-1)[span.start : span.stop] = moved[PARAMETER][part]
    if task.clip is not None:
        rate = {name: rate[name] * slope for name, slope in task.clip.slope(grads).items()}
    bent = _penalty(task, state, grads)
    return Lasting(rate, decay | {name: decay[name] - rate[name] * bent[name] for name in bent})


def _first_entry(chunk: FlatChunk) -> FlatChunk:
    first = chunk.spans[0]
    return FlatChunk(chunk.group, (replace(first, stop=first.start + 1),))


def _begun(update: Update, state: State, grads: Tree) -> State:
    """The state with zeros for the moments that the optimizer makes in its first step: without them it shows none."""
    fresh = [name for name in grads if not state.moments.get(name)]
    if not fresh:
        return state
    made = update(state, {name: grads[name] for name in fresh}).moments
    zeros = {
        name: {key: _before_all(key, moment) for key, moment in made[name].items()}
        for name in fresh
    }
    return replace(state, moments=state.moments | zeros)


def _before_all(key: str, moment: Tensor) -> Tensor:
    """A moment before the first step; factors begin with one, and ASGD's own rate is that of its first step."""
    return moment if key == "eta" else torch.full_like(moment, float(key in {"mu", "mu_product"}))


def _lasting(entries: Entries, source: str) -> Tensor:
    """How far a lasting change of an input moves the parameter."""
    found = entries.get((PARAMETER, source), torch.zeros_like(entries[PARAMETER, PARAMETER]))
    for key in FOLLOWING:
        if (PARAMETER, key) in entries and (key, source) in entries:
            settled = entries[key, source] / (1 - entries[key, key])
            found = found + entries[PARAMETER, key] * settled
    return found


def _penalty(task: Task, state: State, grads: Tree) -> Tree:
    """The diagonal of the penalty's second derivative, if it has one and that is diagonal."""
    penalty = task.penalty
    if penalty is None:
        return {}
    moving = {name: state.params[name] for name in grads}

    def slopes(part: Tree) -> Tree:
        found: Tree = grad(lambda some: penalty(state.params | some))(part)
        return found

    bent: Tree = vjp(slopes, moving)[1](each(torch.ones_like, moving))[0]  # symmetric
    return bent
