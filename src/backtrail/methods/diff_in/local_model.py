"""The loss around one state of a training, by gradients and finite differences of gradients."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from backtrail.errors import BacktrailError
from backtrail.methods.diff_in.finite_differences import Differences, length
from backtrail.methods.diff_in.row_gradients import Proxy, RowGradients
from backtrail.methods.diff_in.subspace import Subspace, orthonormal, random_combinations
from backtrail.methods.diff_in.trajectory import Point
from backtrail.sweep.rerun import select_run
from backtrail.task.task import Batch
from backtrail.tree import Tree, flat_rows, stack

log = logging.getLogger(__name__)
PRODUCTS_AT_ONCE = 8
# Power iterations. The gradient, where they start, already has large parts along steep directions.
POWER_ITERATIONS = 5
# Rows whose curvature is checked against the exact product, and the relative error that is logged.
CHECKED_ROWS = 8
LARGE_ERROR = 0.05


@final
@dataclass(frozen=True)
class LocalModel:
    """The losses of single rows and of the proxy batch around one state.

    Attributes:
        point: The state.
        rows: Gradients of single rows there.
        proxy: The training's loss, estimated on the proxy batch B.
        differences: How directional derivatives are taken.
        subspace: Directions through which the curvature between rows is taken; None takes every
            product exactly.
    """

    point: Point
    rows: RowGradients
    proxy: Proxy
    differences: Differences
    subspace: Subspace | None = None

    @cached_property
    def step(self) -> Tree:
        """The step that gradient descent takes on the proxy batch, without its sign: D G_B."""
        return self.point.scaled(self.proxy.gradient(self.point.trained))

    def gradients(self, batch: Batch) -> Tree:
        """The gradient of every row of a batch, G_z, `[row, ...]`."""
        return self.rows.each(batch, self.point.trained)

    def along_step(self, function: Callable[[Tree], Tree]) -> tuple[Tree, Tree]:
        """Derivative of gradients along the proxy batch's step, H_z D G_B, and the gradients."""
        return self.differences.derivative_and_value(function, self.point.trained, self.step)

    def curvature_product(self, directions: Tree) -> Tree:
        """Curvature products H_B v with a stack of directions, `[direction, ...]`.

        Raises:
            BacktrailError: The task is wrong, which no other way of computing would change.
        """

        def product(direction: Tree) -> Tree:
            return self.differences(self.proxy.gradient, self.point.trained, direction)

        try:
            products: Tree = vmap(product, chunk_size=PRODUCTS_AT_ONCE)(directions)
        except BacktrailError:  # says what is wrong, whether in a batch or one by one
            raise
        except (RuntimeError, NotImplementedError, ValueError):
            # The model has an operation without a batching rule.
            count = len(next(iter(directions.values())))
            products = stack([product(select_run(directions, index)) for index in range(count)])
        return products

    def scaled_curvature_product(self, directions: Tree) -> Tree:
        """Curvature products between steps rather than gradients: D H_B D v."""
        return self.point.scaled(self.curvature_product(self.point.scaled(directions)))

    def scaled_inner_product(self, left: Tree, right: Tree) -> Float[Tensor, " row"]:
        """Inner products <left, D right> of two stacks, row by row."""
        like = next(iter(left.values()))
        total = torch.zeros(len(like), dtype=like.dtype, device=like.device)
        for name, rate in self.point.rates.items():
            total = total + rate * flat_rows(left[name] * right[name]).sum(1)
        return total

    def bilinear(self, left: Tree, right: Tree) -> Float[Tensor, " row"]:
        """Products <D left, H_B D right> of two stacks through the curvature, row by row."""
        if self.subspace is not None:
            return self.subspace.bilinear(left, right)
        return self.scaled_inner_product(left, self.curvature_product(self.point.scaled(right)))

    def within(self, rank: int) -> "LocalModel":
        """Take the curvature between rows through `rank` directions; log where that is inaccurate.

        The directions are drawn from the gradients of the proxy batch's rows, and turned towards
        large curvature. One-sided differences are accurate enough for that and for the check, at
        half the cost.
        """
        gradients = [self.gradients(batch) for batch in self.proxy.batches]
        one_sided = replace(self, differences=replace(self.differences, sides="one-sided"))
        drawn = orthonormal(random_combinations(gradients, rank))
        turned = one_sided.scaled_curvature_product(drawn)
        subspace = Subspace.spanned(turned, self.scaled_curvature_product)

        checked = {name: tensor[:CHECKED_ROWS] for name, tensor in gradients[0].items()}
        exact = one_sided.bilinear(checked, checked)
        difference = subspace.bilinear(checked, checked) - exact
        error = float(difference.norm() / exact.norm().clamp_min(1e-30))
        if error > LARGE_ERROR:
            log.warning(
                "At state %d, curvature through rank=%d directions is off by %.0f %%: raise rank=.",
                self.point.state,
                rank,
                100 * error,
            )
        return replace(self, subspace=subspace)

    def steepness(self) -> float:
        """Largest eigenvalue of |D|^(1/2) H_B |D|^(1/2), by power iteration on the proxy batch."""
        roots = {name: abs(rate) ** 0.5 for name, rate in self.point.rates.items()}
        vector = self.step
        eigenvalue = 0.0
        for _ in range(POWER_ITERATIONS):
            size = length(vector).clamp_min(1e-30)
            unit = {name: root * vector[name] / size for name, root in roots.items()}
            product = self.differences(self.proxy.gradient, self.point.trained, unit)
            vector = {name: root * product[name] for name, root in roots.items()}
            eigenvalue = float(length(vector))
        return eigenvalue
