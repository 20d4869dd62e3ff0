r"""The gradient of one micro-batch and its derivative along a change of parameters, running statistics and weights.

.. math:: \dot g = \nabla^2 L\, \dot\theta + \partial_B \nabla L\, \dot B + \sum_b c_b \dot w_b \nabla \ell_b

The loss is linear in the weights, so the last term is the gradient of the loss with the change for
its weights. Every function here is the transpose of one of `linearised.py` and `chain.py`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from backtrail.curvature.gauss_newton import Backbone, SplitPoint, penalty_of
from backtrail.curvature.vjp import Product, Tensors, free, nudged
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, add, each

Both = tuple[
    State, State
]  # parameters and buffers before a piece, and the change of those that are free


@dataclass(frozen=True, slots=True)
class Pushed:
    """A piece's gradient, the buffers that it leaves, and the changes of the gradient and of the running ones."""

    gradient: Tree
    buffers: Tree
    gradient_change: Tree
    buffers_change: Tree


def pushed(micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
    """Exact, by forward mode over reverse mode."""
    state, change = both
    trained, running = free(micro_batch, state.params, state.buffers)

    def gradient(part: Tree, some: Tree, w: Tensor) -> tuple[Tree, Tree]:
        value, after, _ = micro_batch.gradient(state.params | part, state.buffers | some, w)
        return value, after

    primals, tangents = (
        (trained, running, torch.ones_like(weights)),
        (change.params, change.buffers, weights),
    )
    (value, after), (slopes, left) = along(gradient, primals, tangents)
    return Pushed(value, after, slopes, {name: left[name] for name in running})


def pushed_apart(micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
    """By central differences: two more gradients, and no kernel is differentiated twice or forward."""
    state, change = both
    trained, running = free(micro_batch, state.params, state.buffers)
    size, moved = nudged(trained, change.params)

    def at(sign: float) -> tuple[Tree, Tree]:
        some = {
            name: tensor + sign * size * change.buffers[name] for name, tensor in running.items()
        }
        value, after, _ = micro_batch.slopes(
            state.params | moved(sign), state.buffers | some, 1 + sign * size * weights
        )
        return value, {name: after[name] for name in running}

    value, after, _ = micro_batch.slopes(state.params, state.buffers, None)
    slopes, left = (
        {name: (tensor - down[name]) / (2 * size) for name, tensor in up.items()}
        for up, down in zip(at(1.0), at(-1.0), strict=True)
    )
    return Pushed(value, after, slopes, left)


def pushed_through(
    micro_batch: MicroBatch, both: Both, *, weights: Tensor, cut: SplitPoint, product: Product
) -> Pushed:
    r"""With the curvature K of what follows a cut: :math:`J^\top (K J \dot\theta + \dot s)`, s the slopes there."""
    if not micro_batch.contributes:  # only its running statistics matter, and their way is exact
        return pushed(micro_batch, both, weights=weights)
    state, change = both
    begun = Backbone.of(micro_batch, state.params, state.buffers, cut=cut)
    ends, left = _ends(micro_batch, both, cut=cut, product=product)
    with torch.enable_grad(), micro_batch.randomness():
        head, added = (
            cut.head(micro_batch, begun.outputs, w) for w in (torch.ones_like(weights), weights)
        )
    curved, _ = head.curve(ends)
    slopes = tuple(map(torch.add, added.slopes, curved)) if curved else added.slopes
    gradient, bent = (begun.sloped(some, twice=False)[0] for some in (head.slopes, slopes))
    slope, bend = penalty_of(micro_batch, state.params)
    if curved:
        bent = add(
            bent, {name: tensor for name, tensor in bend(change.params).items() if name in bent}
        )
    gradient = {
        name: tensor + slope[name] if name in slope else tensor for name, tensor in gradient.items()
    }
    return Pushed(gradient, each(Tensor.detach, begun.after), each(Tensor.detach, bent), left)


def _ends(
    micro_batch: MicroBatch, both: Both, *, cut: SplitPoint, product: Product
) -> tuple[Tensors, Tree]:
    """The changes of the ends of the network, and of the running statistics that are left."""
    state, change = both
    trained, running = free(micro_batch, state.params, state.buffers)

    def beginning(part: Tree, some: Tree) -> tuple[Tensors, Tree]:
        with micro_batch.randomness():
            outputs, after = micro_batch.transition.task.outputs(
                state.params | part, state.buffers | some, micro_batch.batch
            )
            return cut.ends(micro_batch, outputs), {name: after[name] for name in running}

    if product == "autograd":
        found: tuple[Tensors, Tree] = along(
            beginning, (trained, running), (change.params, change.buffers)
        )[1]
        return found
    size, moved = nudged(trained, change.params)
    with torch.no_grad():
        up, down = (
            beginning(
                moved(sign),
                {name: t + sign * size * change.buffers[name] for name, t in running.items()},
            )
            for sign in (1.0, -1.0)
        )
    ends = tuple((left - right) / (2 * size) for left, right in zip(up[0], down[0], strict=True))
    return ends, {name: (tensor - down[1][name]) / (2 * size) for name, tensor in up[1].items()}


def along(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Value and derivative of a function; both may be nested.

    >>> import torch
    >>> along(lambda x: x**2, (torch.tensor(3.0),), (torch.tensor(1.0),))
    (tensor(9.), tensor(6.))
    """
    with warnings.catch_warnings():
        # The first call in a process loads torch's rules, and they are made by a way that torch
        # itself deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        value, change, *_ = jvp(function, primals, tangents)
    return value, change
