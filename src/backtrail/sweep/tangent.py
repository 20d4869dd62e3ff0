r"""The tangent sweep: a first-order change of the weights of slots walks forward through the recorded steps.

With a change of the state before a step (METHODS: θ the parameters, m the moments, U the update),
and a change of the weights of its slots,

.. math::
    \dot g = \nabla^2 L_t\, \dot\theta + \sum_b c_{t,b} \dot w_{t,b} \nabla \ell_b
    \qquad
    (\dot\theta, \dot m) \leftarrow U_t'(\dot\theta, \dot m, \dot g)

It is the transpose of the adjoint sweep: that one tells one number from the change of every slot,
this one the change of every number from that of some slots. One sweep costs about as much whatever
the number of slots.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.curvature.jvp import GradientJVP, value_and_jvp
from backtrail.optim.flatten import FlatChunk, flat_chunks
from backtrail.optim.jacobian import GRADIENT, PARAMETER, Diagonals
from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.sweep.rules import Rules
from backtrail.tree import Tree, add


@dataclass(frozen=True, slots=True)
class Changed:
    """A state, and its first-order change: of trained parameters, running statistics and elementwise moments.

    A moment that is missing from the change does not change.
    """

    state: State
    change: State

    @staticmethod
    def begin(transition: Transition, state: State) -> "Changed":
        """A state that has not changed yet."""
        trained = {name: torch.zeros_like(state.params[name]) for name in transition.trained}
        running = {name: torch.zeros_like(state.buffers[name]) for name in transition.task.running}
        return Changed(state, State(trained, running))


def push_forward(
    transition: Transition, now: Changed, weights: Float[Tensor, " slot"], *, rules: Rules
) -> tuple[State, State]:
    """Take the change of the state before a step to that of the state after it.

    Args:
        transition: the step.
        now: the state before it, and its change.
        weights: change of the weights of the step's slots: -1 removes a slot.
        rules: how derivatives are taken.

    Returns:
        The state after the step as it happened, and its change.
    """
    state, update = now.state, transition.update
    with transition.replaying(twice=rules.curvature.product == "autograd"):
        found = _pieces(transition, now, weights, rules=rules)
    consumed, buffers = found.gradient, found.buffers
    if (
        transition.step.autocast
    ):  # the update was made from another gradient than the one that is differentiated
        consumed, buffers, _ = transition.raw_gradient(state)
    clipped, slopes = consumed, found.gradient_tangent
    if transition.task.clip is not None:
        clipped, slopes = value_and_jvp(transition.clipped, (consumed,), (slopes,))
    slots = sum(transition.sizes)
    derivatives = (
        (chunk, rules.slope.diagonals(update, state, clipped, chunk=chunk, slots=slots))
        for chunk in flat_chunks(update, state, clipped)
    )
    params, moments = push_update(derivatives, slopes, change=now.change)
    return transition.moved(state, clipped, buffers), State(params, found.buffers_tangent, moments)


def _pieces(transition: Transition, now: Changed, weights: Tensor, *, rules: Rules) -> GradientJVP:
    """The whole step's gradient and its change, micro-batch by micro-batch."""
    state, change, total = (
        now.state,
        now.change,
        GradientJVP({}, now.state.buffers, {}, now.change.buffers),
    )
    for micro_batch, part in zip(
        transition.micro_batches(), transition.split(weights), strict=True
    ):
        assert part is not None
        at = Changed(
            State(state.params, total.buffers), State(change.params, total.buffers_tangent)
        )
        found = rules.curvature.gradient_jvp(micro_batch, at.state, at.change, weights=part)
        total = GradientJVP(
            add(total.gradient, found.gradient),
            found.buffers,
            add(total.gradient_tangent, found.gradient_tangent),
            found.buffers_tangent,
        )
    return total


def push_update(
    derivatives: Iterable[tuple[FlatChunk, Diagonals]], grads: Tree, *, change: State
) -> tuple[Tree, dict[str, Tree]]:
    """Take the change of the state before an update, and of the gradient, to the parameters and moments after it.

    Args:
        derivatives: the update's derivative, chunk by chunk.
        grads: the change of the (clipped) gradient.
        change: that of the state; parameters without gradient, and their moments, keep theirs.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for chunk, diagonals in derivatives:
        after = _products(diagonals, _before(chunk, grads, change))
        for part, place in chunk.parts():
            for key, tensor in after.items():
                parts.setdefault(part.name, {}).setdefault(key, []).append(tensor[place])
    found = {
        name: {k: torch.cat(t).view_as(grads[name]) for k, t in tree.items()}
        for name, tree in parts.items()
    }
    moved = {name: tree.pop(PARAMETER) for name, tree in found.items()}
    return change.params | moved, change.moments | found


def _before(chunk: FlatChunk, grads: Tree, change: State) -> Tree:
    """The changes of a chunk's inputs, `[entry]`."""
    keys = {key for part in chunk.slices for key in change.moments.get(part.name, {})}
    moments = {
        key: chunk.gather({part.name: change.moments[part.name][key] for part in chunk.slices})
        for key in keys
    }
    return moments | {PARAMETER: chunk.gather(change.params), GRADIENT: chunk.gather(grads)}


def _products(diagonals: Diagonals, before: Tree) -> Tree:
    after: Tree = {}
    for (output, source), diagonal in diagonals.items():
        if source in before:
            after = add(after, {output: diagonal * before[source]})
    return after
