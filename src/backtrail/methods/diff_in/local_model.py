"""A training's loss around one of its states, by gradients and differences of gradients."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from backtrail.methods.diff_in.finite_differences import Differences, length
from backtrail.methods.diff_in.row_gradients import Proxy, RowGradients
from backtrail.methods.diff_in.subspace import Subspace, mixed, orthonormal
from backtrail.methods.diff_in.trajectory import Point
from backtrail.sweep.rerun import select
from backtrail.task.task import Batch
from backtrail.tree import Tree, stack

log = logging.getLogger(__name__)
TOGETHER = 8  # curvature products at once
ITERATIONS = 5  # from the gradient, which leans to steep directions already
CHECKED, COARSE = (
    8,
    0.05,
)  # rows whose curvature is checked, and the relative error from which on the log says so


@final
@dataclass(frozen=True)
class LocalModel:
    """The loss of single rows, and of the proxy batch, around a state.

    Attributes:
        subspace: directions through which the curvature between rows is taken; None takes every
            product.
    """

    point: Point
    rows: RowGradients
    proxy: Proxy
    differences: Differences
    subspace: Subspace | None = None

    @cached_property
    def step(self) -> Tree:
        """What a step makes of the proxy batch's gradient: the rates times G_B."""
        return self.point.scaled(self.proxy.gradient(self.point.trained))

    def gradients(self, batch: Batch) -> Tree:
        """The gradient of every row of a batch, G_z."""
        return self.rows.each(batch, self.point.trained)

    def along_step(self, function: Callable[[Tree], Tree]) -> tuple[Tree, Tree]:
        """The derivative along that step of gradients of rows, all that is asked of H_z; and the gradients."""
        return self.differences.around(function, self.point.trained, self.step)

    def curved(self, directions: Tree) -> Tree:
        """Curvature products with a stack of directions, H_B v, `[direction, ...]`."""

        def product(direction: Tree) -> Tree:
            return self.differences(self.proxy.gradient, self.point.trained, direction)

        try:
            found: Tree = vmap(product, chunk_size=TOGETHER)(directions)
        except (RuntimeError, NotImplementedError, ValueError):
            number = len(next(iter(directions.values())))
            found = stack([product(select(directions, row)) for row in range(number)])
        return found

    def bent(self, directions: Tree) -> Tree:
        """Curvature products between what steps make of two gradients, with a stack of the one: D H_B D v."""
        return self.point.scaled(self.curved(self.point.scaled(directions)))

    def paired(self, left: Tree, right: Tree) -> Float[Tensor, " row"]:
        """Inner products of a stack with what steps make of another, row by row."""
        return sum(  # type: ignore[return-value]
            rate * (left[name] * right[name]).flatten(1).sum(1)
            for name, rate in self.point.rates.items()
        )

    def bilinear(self, left: Tree, right: Tree) -> Float[Tensor, " row"]:
        """The products, row by row, of what steps make of two stacks, through the curvature."""
        if self.subspace is not None:
            return self.subspace.bilinear(left, right)
        return self.paired(left, self.curved(self.point.scaled(right)))

    def within(self, rank: int) -> "LocalModel":
        """The same, with the curvature between rows taken through so many directions; the log says where it is coarse.

        They are drawn from the gradients of the proxy batch's rows, and turned to where curvature
        is large. For that, and for the check, one-sided differences do, at half the cost.
        """
        rows = [self.gradients(batch) for batch in self.proxy.batches]
        rough = replace(self, differences=replace(self.differences, sides="one-sided"))
        found = Subspace.spanned(rough.bent(orthonormal(mixed(rows, rank))), self.bent)
        some = {name: tensor[:CHECKED] for name, tensor in rows[0].items()}
        exact = rough.bilinear(some, some)
        off = float((found.bilinear(some, some) - exact).norm() / exact.norm().clamp_min(1e-30))
        if off > COARSE:
            log.warning(
                "at state %d, rank %d is off by %.0f %%: raise rank=",
                self.point.state,
                rank,
                100 * off,
            )
        return replace(self, subspace=found)

    def steepness(self) -> float:
        """The largest rate times curvature around the state, by power iteration on the proxy batch."""
        halves = {name: abs(rate) ** 0.5 for name, rate in self.point.rates.items()}
        vector, found = self.step, 0.0
        for _ in range(ITERATIONS):
            size = length(vector).clamp_min(1e-30)
            unit = {name: half * vector[name] / size for name, half in halves.items()}
            product = self.differences(self.proxy.gradient, self.point.trained, unit)
            vector = {name: half * product[name] for name, half in halves.items()}
            found = float(length(vector))
        return found
