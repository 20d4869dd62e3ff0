"""How a sweep takes derivatives: of the loss twice, and of the optimizer's update once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.accel.context import accelerated
from backtrail.curvature.policies import Curvature, Hessian
from backtrail.curvature.vjp import GradientVJP
from backtrail.optim.flatten import FlatChunk, flat_chunks
from backtrail.optim.jacobian import GRADIENT, Diagonals, dead_entries
from backtrail.optim.slopes import Tangent, UpdateDerivative
from backtrail.step.state import State
from backtrail.step.step import MicroBatch, Transition
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Rules:
    """How a sweep takes derivatives.

    Attributes:
        curvature: how the product with the loss's second derivative is taken.
        slope: how the update is differentiated.
    """

    curvature: Curvature
    slope: UpdateDerivative

    def _by_differences(self, transition: Transition) -> bool:
        """Whether products are differences of gradients, along the cotangent of a gradient.

        That must not be huge at entries which never receive a gradient: it would leave no precision
        for the others.
        """
        missing = transition.task.binding.no_second_derivative
        return self.curvature.product == "difference" or bool(missing)

    @property
    def exact(self) -> bool:
        """Whether the sweep is the derivative of the training."""
        return isinstance(self.curvature, Hessian) and isinstance(self.slope, Tangent)

    def gradient_vjp(
        self,
        micro_batch: MicroBatch,
        params: Tree,
        buffers: Tree,
        *,
        weights: Float[Tensor, " slot"],
    ) -> GradientVJP:
        """Gradient of a micro-batch at a point, with its vector-Jacobian product."""
        with accelerated():
            return self.curvature.gradient_vjp(micro_batch, params, buffers, weights=weights)

    def update_derivatives(
        self, transition: Transition, state: State, clipped: Tree
    ) -> Iterator[tuple[FlatChunk, Diagonals]]:
        """Differentiate a step's update, chunk by chunk: all diagonals at once might not fit.

        Args:
            transition: the step.
            state: the state before it.
            clipped: the gradient that the optimizer consumes.
        """
        update = transition.update
        slots = sum(transition.slot_counts)
        for chunk in flat_chunks(update, state, clipped):
            diagonals = self.slope.diagonals(update, state, clipped, chunk=chunk, slots=slots)
            if self._by_differences(transition):
                dead = dead_entries(update, state, clipped, chunk=chunk)
                diagonals = _without(diagonals, dead)
            yield chunk, diagonals


def _without(diagonals: Diagonals, dead: Tensor | None) -> Diagonals:
    """Set the derivatives by the gradient to zero at dead entries."""
    if dead is None:
        return diagonals
    found: Diagonals = {}
    for (output, source), diagonal in diagonals.items():
        is_gradient = source == GRADIENT
        found[output, source] = torch.where(dead, 0.0, diagonal) if is_gradient else diagonal
    return found
