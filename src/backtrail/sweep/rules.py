"""How a sweep takes derivatives: of the loss twice, and of the optimizer's update once."""

from dataclasses import dataclass

from torch import Tensor

from backtrail.accel.context import accelerated
from backtrail.curvature.policies import Curvature, Hessian
from backtrail.curvature.vjp import GradientVJP
from backtrail.optim.slopes import Tangent, UpdateDerivative
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree


@dataclass(frozen=True, slots=True)
class Rules:
    """How a sweep takes derivatives: of the loss twice, and of the optimizer's update."""

    curvature: Curvature
    slope: UpdateDerivative

    @property
    def exact(self) -> bool:
        """Whether the sweep is the derivative of the training."""
        return isinstance(self.curvature, Hessian) and isinstance(self.slope, Tangent)

    def gradient_vjp(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a micro-batch at a point, with its vector-Jacobian product."""
        with accelerated():
            return self.curvature.gradient_vjp(micro_batch, params, buffers, weights=weights)
