"""How a sweep takes derivatives: of the loss twice, and of the optimizer's update once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from backtrail.accel.context import accelerated
from backtrail.curvature.policies import Curvature, Hessian
from backtrail.curvature.vjp import GradientVJP
from backtrail.optim.flatten import FlatChunk, flat_chunks
from backtrail.optim.jacobian import Diagonals
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
        missing = transition.task.binding.no_second_derivative
        if missing or self.curvature.product == "difference":
            # Huge cotangents at entries that no sample's gradient reaches would leave no precision
            # for the others.
            update = replace(update, zero_factor={})
        slots = sum(transition.slot_counts)
        for chunk in flat_chunks(update, state, clipped):
            diagonals = self.slope.diagonals(update, state, clipped, chunk=chunk, slots=slots)
            yield chunk, diagonals
