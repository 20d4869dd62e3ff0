r"""Which second derivative of a step's loss a reverse sweep takes.

Every policy but `Hessian` puts another matrix in the place of :math:`\nabla^2 L`. The scores
:math:`c_b \langle a, \nabla \ell_b \rangle` and the path through running statistics stay exact.
"""

import abc
from dataclasses import dataclass
from typing import final

from torch import Tensor

from backtrail.curvature.gauss_newton import AtLosses, AtOutputs, through
from backtrail.curvature.jvp import Both, Pushed, pushed, pushed_apart, pushed_through
from backtrail.curvature.vjp import GradientVJP, Product, differenced, differentiated
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree


class Curvature(abc.ABC):
    """Says how the loss's second derivative is taken in a reverse sweep."""

    product: Product

    @abc.abstractmethod
    def linearise(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a piece and its transposed derivative at the given point."""

    @abc.abstractmethod
    def push(self, micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
        """Gradient of a piece and its change by that of a state and of weights: the transpose of `linearise`."""


@final
@dataclass(frozen=True, slots=True)
class Hessian(Curvature):
    r"""The exact product :math:`\nabla^2 L\, a`.

    Right for smooth networks, early steps and long runs. Prefer another policy where the training
    is not smooth at the scale of one sample (ReLU with Adam): the exact derivative is then right
    and yet a poor guide to a removal.

    Args:
        product: "autograd" differentiates the gradient once more. "difference" takes two ordinary
            gradients per query, :math:`(\nabla L(\theta + \epsilon a) - \nabla L(\theta - \epsilon
            a)) / 2 \epsilon`: in training's own memory, with training's own attention kernels, and
            less exact.
    """

    product: Product = "autograd"

    def linearise(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a piece and its transposed derivative."""
        if self.product == "difference":
            return differenced(micro_batch, params, buffers, weights=weights)
        return differentiated(micro_batch, params, buffers, weights=weights)

    def push(self, micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
        """Gradient of a piece and its change."""
        return (pushed_apart if self.product == "difference" else pushed)(
            micro_batch, both, weights=weights
        )


@final
@dataclass(frozen=True, slots=True)
class GaussNewton(Curvature):
    r"""The generalised Gauss-Newton product :math:`J^\top \nabla^2_f \ell\, J a`, with J that of the model's outputs f.

    Positive semidefinite where the loss is convex in the outputs, so a sweep stays stable where the
    network is not smooth (ReLU with Adam); and the cheapest with any curvature. It drops what bends
    the outputs themselves. The curvature of a penalty is kept exact.

    Args:
        product: how J a is taken: "autograd", or as a "difference" of the outputs of two forward
            passes.
    """

    product: Product = "autograd"

    def linearise(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a piece and the product with its Gauss-Newton matrix."""
        return through(
            micro_batch, params, buffers, weights=weights, cut=AtOutputs(), product=self.product
        )

    def push(self, micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
        """Gradient of a piece and its change."""
        return pushed_through(
            micro_batch, both, weights=weights, cut=AtOutputs(), product=self.product
        )


@final
@dataclass(frozen=True, slots=True)
class EmpiricalFisher(Curvature):
    r"""The product :math:`\sum_b c_b\, g_b \langle g_b, a \rangle` with the gradients g of the samples' losses.

    What Data Value Embedding (arXiv 2412.09538) takes for the Gauss-Newton matrix; offered for
    comparison.

    Args:
        product: how :math:`\langle g_b, a \rangle` is taken: "autograd", or as a "difference" of
            losses.
    """

    product: Product = "autograd"

    def linearise(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a piece and the product with its empirical Fisher matrix."""
        return through(
            micro_batch,
            params,
            buffers,
            weights=weights,
            cut=AtLosses(bends=True),
            product=self.product,
        )

    def push(self, micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
        """Gradient of a piece and its change."""
        return pushed_through(
            micro_batch, both, weights=weights, cut=AtLosses(bends=True), product=self.product
        )


@final
@dataclass(frozen=True, slots=True)
class Zero(Curvature):
    """No curvature: every visit counts as if no later step felt it, as in TracIn, but through the real optimizer.

    Args:
        product: how the scores are taken: "autograd", or as a "difference" of losses.
    """

    product: Product = "autograd"

    def linearise(
        self, micro_batch: MicroBatch, params: Tree, buffers: Tree, *, weights: Tensor
    ) -> GradientVJP:
        """Gradient of a piece, and its scores alone."""
        return through(
            micro_batch,
            params,
            buffers,
            weights=weights,
            cut=AtLosses(bends=False),
            product=self.product,
        )

    def push(self, micro_batch: MicroBatch, both: Both, *, weights: Tensor) -> Pushed:
        """Gradient of a piece and its change."""
        return pushed_through(
            micro_batch, both, weights=weights, cut=AtLosses(bends=False), product=self.product
        )
