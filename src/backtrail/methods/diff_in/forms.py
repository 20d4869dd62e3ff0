r"""The two sums of Diff-In, term by term: what one state says of a sample's removal.

With D the rates of the parameter groups (η of the formulas), and all else at the state t:

.. math::
    \text{published:} \; -t\, D (H_B D G_z + H_z D G_B) \qquad
    \text{corrected:} \; D G_z - t\, D H_B D G_z

The corrected term has no H_z G_B: G_z at the state has moved along the training already, and holds
it.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from backtrail.methods.diff_in.local_model import LocalModel
from backtrail.methods.diff_in.row_gradients import products
from backtrail.methods.diff_in.trajectory import Point
from backtrail.task.task import Batch
from backtrail.tree import Tree, add, each, joined

Scores = Callable[[Batch], Float[Tensor, "direction row"]]


@final
@dataclass(frozen=True, slots=True)
class EndGradients:
    """Gradients of rows at the end of a training."""

    point: Point
    slopes: Tree


class Form(abc.ABC):
    """One way to sum the terms of a few states."""

    name: str
    # whether terms are paired with gradients at the observed state; else with those at their own
    at_the_end: bool

    @abc.abstractmethod
    def factor(self, steps: int) -> float:
        """What a term counts among m of them, times m N, for a training of so many steps."""

    @abc.abstractmethod
    def scores(self, near: LocalModel, slopes: Sequence[Tree]) -> Scores:
        """A state's terms of every row of a batch, paired with stacks of gradients, one after the other."""

    @abc.abstractmethod
    def own(self, near: LocalModel, batch: Batch, ends: EndGradients) -> Float[Tensor, " row"]:
        """A state's terms of every row, each paired with the gradient of its own loss, which `ends` has at the end."""

    @abc.abstractmethod
    def change(self, near: LocalModel, total: Callable[[Tree], Tree]) -> Tree:
        """A state's term of many rows together; `total` is the gradient of the sum of their losses."""


@final
class Corrected(Form):
    """The change of the parameters by a removal, to second order."""

    name = "corrected"
    at_the_end = True

    def factor(self, steps: int) -> float:
        """Every state stands for T/m steps."""
        return float(steps)

    def scores(self, near: LocalModel, slopes: Sequence[Tree]) -> Scores:
        """By symmetry a single product for all rows: <g, G - t H D G> = <g - t H D g, G>."""
        directions = joined([self._direction(near, some) for some in slopes])
        return lambda batch: products(directions, near.gradients(batch))

    def _direction(self, near: LocalModel, slopes: Tree) -> Tree:
        bent = near.bent(slopes)
        return {
            name: tensor - near.point.state * bent[name]
            for name, tensor in near.point.scaled(slopes).items()
        }

    def own(self, near: LocalModel, batch: Batch, ends: EndGradients) -> Float[Tensor, " row"]:
        """One curvature product a row: nothing is shared."""
        slopes = ends.slopes if near.point is ends.point else near.gradients(batch)
        return near.paired(ends.slopes, slopes) - near.point.state * near.bilinear(
            ends.slopes, slopes
        )

    def change(self, near: LocalModel, total: Callable[[Tree], Tree]) -> Tree:
        """One curvature product for all."""
        step = near.point.scaled(total(near.point.trained))
        bent = near.differences(near.proxy.gradient, near.point.trained, step)
        return add(step, each(lambda tensor: -near.point.state * tensor, near.point.scaled(bent)))


@final
class Published(Form):
    """The second-order correction alone, over T, as the paper has it."""

    name = "published"
    at_the_end = False

    def factor(self, steps: int) -> float:
        """Every state counts 1/m."""
        del steps
        return 1.0

    def scores(self, near: LocalModel, slopes: Sequence[Tree]) -> Scores:
        """By symmetry a single product for all rows, and a difference of each row's own."""
        scaled, bent = near.point.scaled(joined(slopes)), near.bent(joined(slopes))

        def found(batch: Batch) -> Tensor:
            apart, rows = near.along_step(lambda trained: near.rows.each(batch, trained))
            return -near.point.state * (products(bent, rows) + products(scaled, apart))

        return found

    def own(self, near: LocalModel, batch: Batch, ends: EndGradients) -> Float[Tensor, " row"]:
        """One curvature product a row: nothing is shared."""
        del ends
        apart, slopes = near.along_step(lambda trained: near.rows.each(batch, trained))
        return -near.point.state * (near.bilinear(slopes, slopes) + near.paired(slopes, apart))

    def change(self, near: LocalModel, total: Callable[[Tree], Tree]) -> Tree:
        """One curvature product for all, and a difference of their gradient."""
        apart, slope = near.along_step(total)
        bent = near.differences(near.proxy.gradient, near.point.trained, near.point.scaled(slope))
        both = near.point.scaled(add(bent, apart))
        return each(lambda tensor: -near.point.state * tensor, both)
