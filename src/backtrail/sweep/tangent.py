r"""The tangent sweep: a change of slot weights is pushed forward through the recorded steps.

A dot is the first-order change. Step t takes the change of the state before it, and that of its
slots' weights, to the change of the state after it:

.. math::
    \text{gradient} \quad & \dot g = \nabla^2 L_t(\theta_t)\, \dot\theta_t
        + \sum_b c_{t,b}\, \dot w_{t,b}\, \nabla \ell_b(\theta_t) \\
    \text{update} \quad & (\dot\theta_{t+1}, \dot m_{t+1})
        = U_t' \, (\dot\theta_t, \dot m_t, \dot g)

with θ the parameters, m the optimizer's moments and U the update. Where the loop clips the
gradient, :math:`\dot g` first goes through the derivative of the clipping. BatchNorm's running
statistics change as well, from one micro-batch to the next.

It is the transpose of the adjoint sweep: that one gives the change of one number by the weight of
every slot, this one the change of every number by the weights of some slots, at about the same cost
for any number of slots.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.curvature.jvp import GradientJVP, value_and_jvp
from backtrail.optim.flatten import FlatChunk
from backtrail.optim.jacobian import GRADIENT, PARAMETER, Diagonals
from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.sweep.rules import Rules
from backtrail.tree import Tree, add


@final
@dataclass(frozen=True, slots=True)
class DualState:
    """A state and its first-order change.

    Attributes:
        state: the state.
        tangent: change of the trained parameters, the running statistics and the elementwise
            moments. A moment that is missing does not change.
    """

    state: State
    tangent: State

    @staticmethod
    def unchanged(transition: Transition, state: State) -> "DualState":
        """The state before a step, with a tangent of zero."""
        params = {name: torch.zeros_like(state.params[name]) for name in transition.trained}
        running = {name: torch.zeros_like(state.buffers[name]) for name in transition.task.running}
        return DualState(state, State(params, running))


def push_forward(
    transition: Transition, dual: DualState, weights: Float[Tensor, " slot"], *, rules: Rules
) -> DualState:
    r"""Push the tangent of the state before a step forward to the state after it.

    Args:
        transition: the step.
        dual: the state before it, and its tangent.
        weights: :math:`\dot w`, the change of the weights of the step's slots: -1 removes a slot.
        rules: how derivatives are taken.

    Returns:
        The state after the step as it happened, and its tangent.
    """
    state = dual.state
    with transition.replaying(double_backward=rules.curvature.product == "autograd"):
        total = _gradient_jvp(transition, dual, weights, rules=rules)
    consumed = total.gradient
    buffers = total.buffers
    if transition.step.autocast:
        # The update was made from another gradient than the one that is differentiated.
        trained = transition.raw_gradient(state)
        consumed = trained.gradient
        buffers = trained.buffers
    clipped = consumed
    gradient_tangent = total.gradient_tangent
    if transition.task.clip is not None:
        clipped, gradient_tangent = value_and_jvp(transition.clip, (consumed,), (gradient_tangent,))
    params, moments = push_update(
        rules.update_derivatives(transition, state, clipped),
        gradient_tangent,
        tangent=dual.tangent,
    )
    after = transition.apply_update(state, clipped, buffers)
    return DualState(after, State(params, total.buffers_tangent, moments))


def _gradient_jvp(
    transition: Transition, dual: DualState, weights: Tensor, *, rules: Rules
) -> GradientJVP:
    r"""The step's gradient and its tangent :math:`\dot g`, summed over its micro-batches."""
    params = dual.state.params
    params_tangent = dual.tangent.params
    total = GradientJVP({}, dual.state.buffers, {}, dual.tangent.buffers)
    weights_of_each = transition.split_weights(weights)
    for micro_batch, its_weights in zip(transition.micro_batches(), weights_of_each, strict=True):
        assert its_weights is not None
        # Each micro-batch starts from the statistics that the one before it left.
        state = State(params, total.buffers)
        tangent = State(params_tangent, total.buffers_tangent)
        term = rules.curvature.gradient_jvp(micro_batch, state, tangent, weights=its_weights)
        total = GradientJVP(
            gradient=add(total.gradient, term.gradient),
            buffers=term.buffers,
            gradient_tangent=add(total.gradient_tangent, term.gradient_tangent),
            buffers_tangent=term.buffers_tangent,
        )
    return total


def push_update(
    derivatives: Iterable[tuple[FlatChunk, Diagonals]], grads: Tree, *, tangent: State
) -> tuple[Tree, dict[str, Tree]]:
    """Apply the JVP of an update to the tangents of the state before it and of the gradient.

    Args:
        derivatives: the update's derivative, chunk by chunk.
        grads: tangent of the clipped gradient.
        tangent: of the state before. Parameters without a gradient, and their moments, keep theirs.

    Returns:
        The tangents of the parameters and of the moments after the update.
    """
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    for chunk, diagonals in derivatives:
        outputs = _products(diagonals, _input_tangents(chunk, grads, tangent))
        for part, place in chunk.parts():
            of_parameter = pieces.setdefault(part.name, {})
            for key, output in outputs.items():
                of_parameter.setdefault(key, []).append(output[place])
    params = dict(tangent.params)
    moments = dict(tangent.moments)
    for name, by_key in pieces.items():
        whole = {key: torch.cat(tensors).view_as(grads[name]) for key, tensors in by_key.items()}
        params[name] = whole.pop(PARAMETER)
        moments[name] = whole
    return params, moments


def _input_tangents(chunk: FlatChunk, grads: Tree, tangent: State) -> Tree:
    """The tangents of the update's inputs at a chunk's entries, `[entry]`, by name."""
    keys = {key for part in chunk.slices for key in tangent.moments.get(part.name, {})}
    inputs: Tree = {}
    for key in keys:
        inputs[key] = chunk.gather(
            {part.name: tangent.moments[part.name][key] for part in chunk.slices}
        )
    inputs[PARAMETER] = chunk.gather(tangent.params)
    inputs[GRADIENT] = chunk.gather(grads)
    return inputs


def _products(diagonals: Diagonals, inputs: Tree) -> Tree:
    r"""Sum :math:`(\partial o / \partial i)\, \dot i` over the inputs i, for every output o."""
    outputs: Tree = {}
    for (output, source), diagonal in diagonals.items():
        if source in inputs:
            outputs = add(outputs, {output: diagonal * inputs[source]})
    return outputs
