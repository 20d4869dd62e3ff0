r"""Curvature policies: which second derivative of a step's loss a sweep uses.

Every policy but `Hessian` puts another matrix in the place of :math:`\nabla^2 L`. The scores
:math:`c_b \langle a, \nabla \ell_b \rangle` and the derivative through running statistics stay
exact.
"""

import abc
from dataclasses import dataclass
from typing import final, get_args

from torch import Tensor

from backtrail import arguments
from backtrail.curvature.gauss_newton import AtLosses, AtOutputs, split_vjp
from backtrail.curvature.jvp import (
    GradientJVP,
    gradient_jvp,
    gradient_jvp_by_differences,
    split_jvp,
)
from backtrail.curvature.vjp import (
    GradientVJP,
    Product,
    gradient_vjp,
    gradient_vjp_by_differences,
)
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree


class Curvature(abc.ABC):
    r"""How a sweep takes the second derivative of a step's loss: one of the policies below.

    A reverse sweep multiplies the cotangent a of every query by the derivative of the step's
    gradient :math:`\nabla L = \sum_b c_b w_b \nabla \ell_b + \nabla R`. A policy computes that
    product, with the exact Hessian (`Hessian`) or another matrix in its place.

    A policy of your own derives from this class. `gradient_vjp` returns the gradient at a point
    with its vector-Jacobian product, and `gradient_jvp` the gradient with its Jacobian-vector
    product; the two must be transposes of each other. They receive one micro-batch, the parameters,
    the buffers and the weights w `[slot]` of the samples.

    >>> import backtrail
    >>> isinstance(backtrail.GaussNewton(), backtrail.Curvature)
    True

    Attributes:
        product: "autograd", or "difference" for a central difference of ordinary gradients.
    """

    product: Product

    @abc.abstractmethod
    def gradient_vjp(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a micro-batch at a point, with its vector-Jacobian product."""

    @abc.abstractmethod
    def gradient_jvp(
        self, micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
    ) -> GradientJVP:
        """Gradient of a micro-batch, with its Jacobian-vector product.

        It is the transpose of `gradient_vjp`.

        Args:
            micro_batch: The loss.
            state: Parameters and buffers before the forward pass.
            tangent: Of the trained parameters and the running statistics.
            weights: Tangent of the sample weights, `[slot]`.
        """


@final
@dataclass(frozen=True, slots=True)
class Hessian(Curvature):
    r"""The exact product :math:`\nabla^2 L\, a`.

    Right for smooth networks, early steps and long runs. Prefer another policy where the training
    is not smooth at the scale of one sample (ReLU with Adam): the exact derivative is then right,
    but a poor prediction of a removal.

    Args:
        product: "autograd" differentiates the gradient once more. "difference" takes two ordinary
            gradients per query, :math:`(\nabla L(\theta + \epsilon a) - \nabla L(\theta - \epsilon
            a)) / 2 \epsilon`: in training's own memory, with training's own attention kernels, and
            less exact.
    """

    product: Product = "autograd"

    def __post_init__(self) -> None:
        """Check the argument.

        Raises:
            BadSetting: It has an invalid value.
        """
        arguments.choice("product", self.product, get_args(Product))

    def gradient_vjp(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a micro-batch and its vector-Jacobian product."""
        missing = micro_batch.transition.task.binding.no_second_derivative
        if self.product == "difference" or missing:
            return gradient_vjp_by_differences(micro_batch, params, buffers, weights=weights)
        return gradient_vjp(micro_batch, params, buffers, weights=weights)

    def gradient_jvp(
        self, micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
    ) -> GradientJVP:
        """Gradient of a micro-batch and its Jacobian-vector product."""
        missing = micro_batch.transition.task.binding.no_second_derivative
        if self.product == "difference" or missing:
            return gradient_jvp_by_differences(micro_batch, state, tangent, weights=weights)
        return gradient_jvp(micro_batch, state, tangent, weights=weights)


@final
@dataclass(frozen=True, slots=True)
class GaussNewton(Curvature):
    r"""The generalised Gauss-Newton product :math:`J^\top \nabla^2_f \ell\, J a`.

    J is the derivative of the model's outputs f. Positive semidefinite where the loss is convex in
    the outputs, so a sweep stays stable where the network is not smooth (ReLU with Adam); and the
    cheapest policy with any curvature. It drops the second derivative of the outputs. The
    curvature of a penalty is kept exact.

    Args:
        product: How J a is computed: "autograd", or as a "difference" of the outputs of two
            forward passes.
    """

    product: Product = "autograd"

    def __post_init__(self) -> None:
        """Check the argument.

        Raises:
            BadSetting: It has an invalid value.
        """
        arguments.choice("product", self.product, get_args(Product))

    def gradient_vjp(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a micro-batch and its VJP with the Gauss-Newton matrix."""
        return split_vjp(
            micro_batch, params, buffers, weights=weights, split=AtOutputs(), product=self.product
        )

    def gradient_jvp(
        self, micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
    ) -> GradientJVP:
        """Gradient of a micro-batch and its JVP with the Gauss-Newton matrix."""
        return split_jvp(
            micro_batch, state, tangent, weights=weights, split=AtOutputs(), product=self.product
        )


@final
@dataclass(frozen=True, slots=True)
class EmpiricalFisher(Curvature):
    r"""The product :math:`\sum_b c_b\, g_b \langle g_b, a \rangle` with the samples' gradients g.

    What Data Value Embedding (arXiv 2412.09538) uses for the Gauss-Newton matrix; offered for
    comparison.

    Args:
        product: How :math:`\langle g_b, a \rangle` is computed: "autograd", or as a "difference" of
            losses.
    """

    product: Product = "autograd"

    def __post_init__(self) -> None:
        """Check the argument.

        Raises:
            BadSetting: It has an invalid value.
        """
        arguments.choice("product", self.product, get_args(Product))

    def gradient_vjp(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a micro-batch and its VJP with the empirical Fisher matrix."""
        split = AtLosses(curved=True)
        return split_vjp(
            micro_batch, params, buffers, weights=weights, split=split, product=self.product
        )

    def gradient_jvp(
        self, micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
    ) -> GradientJVP:
        """Gradient of a micro-batch and its JVP with the empirical Fisher matrix."""
        split = AtLosses(curved=True)
        return split_jvp(
            micro_batch, state, tangent, weights=weights, split=split, product=self.product
        )


@final
@dataclass(frozen=True, slots=True)
class Zero(Curvature):
    """No curvature: a visit counts as if no later step's gradient depended on it.

    As in TracIn, but through the real optimizer.

    Args:
        product: How the scores are computed: "autograd", or as a "difference" of losses.
    """

    product: Product = "autograd"

    def __post_init__(self) -> None:
        """Check the argument.

        Raises:
            BadSetting: It has an invalid value.
        """
        arguments.choice("product", self.product, get_args(Product))

    def gradient_vjp(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a micro-batch, and its scores alone."""
        split = AtLosses(curved=False)
        return split_vjp(
            micro_batch, params, buffers, weights=weights, split=split, product=self.product
        )

    def gradient_jvp(
        self, micro_batch: MicroBatch, state: State, tangent: State, *, weights: Tensor
    ) -> GradientJVP:
        """Gradient of a micro-batch and its JVP without curvature."""
        split = AtLosses(curved=False)
        return split_jvp(
            micro_batch, state, tangent, weights=weights, split=split, product=self.product
        )
