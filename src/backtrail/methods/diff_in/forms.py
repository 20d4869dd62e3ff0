r"""The two sums of Diff-In, term by term: what one state says of a sample's removal.

With D the learning rates by parameter group (η of the formulas) and everything else at state t:

.. math::
    \text{published:} \; -t\, D (H_B D G_z + H_z D G_B) \qquad
    \text{corrected:} \; D G_z - t\, D H_B D G_z

The corrected term has no :math:`H_z G_B`. The gradient :math:`G_z` is taken at a state that has
already moved along the training, so it contains that part; adding it would count it twice.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from backtrail.methods.diff_in.local_model import LocalModel
from backtrail.methods.diff_in.row_gradients import inner_products
from backtrail.methods.diff_in.trajectory import Point
from backtrail.task.task import Batch
from backtrail.tree import Tree, add, concatenate, each

Scores = Callable[[Batch], Float[Tensor, "direction row"]]


@final
@dataclass(frozen=True, slots=True)
class EndGradients:
    """Gradients of rows at the final state, `[row, ...]`."""

    point: Point
    gradients: Tree


class Form(abc.ABC):
    """One way to sum the terms of a few states."""

    name: str
    # Whether terms are paired with the queries' gradients at the observed state (corrected) or
    # with those at the term's own state (published).
    pairs_at_observed_state: bool

    @abc.abstractmethod
    def factor(self, steps: int) -> float:
        """Weight of a term, times m N, in a training of so many steps with m states."""

    @abc.abstractmethod
    def scores(self, model: LocalModel, gradients: Sequence[Tree]) -> Scores:
        """Return a function from a batch to its rows' terms, paired with stacks of gradients."""

    @abc.abstractmethod
    def own(self, model: LocalModel, batch: Batch, ends: EndGradients) -> Float[Tensor, " row"]:
        """Terms of every row of a batch, each paired with the gradient of its own loss."""

    @abc.abstractmethod
    def change(self, model: LocalModel, gradient: Callable[[Tree], Tree]) -> Tree:
        """Term of many rows together; `gradient` is that of the sum of their losses."""


@final
class Corrected(Form):
    """The change of the parameters by a removal, to second order."""

    name = "corrected"
    pairs_at_observed_state = True

    def factor(self, steps: int) -> float:
        """Every state stands for T/m steps."""
        return float(steps)

    def scores(self, model: LocalModel, gradients: Sequence[Tree]) -> Scores:
        """By symmetry one product serves all rows: <q, G - t H D G> = <q - t H D q, G>."""
        directions = concatenate([self._direction(model, stack) for stack in gradients])
        return lambda batch: inner_products(directions, model.gradients(batch))

    def _direction(self, model: LocalModel, gradients: Tree) -> Tree:
        t = model.point.state
        curved = model.scaled_curvature_product(gradients)
        scaled = model.point.scaled(gradients)
        return {name: tensor - t * curved[name] for name, tensor in scaled.items()}

    def own(self, model: LocalModel, batch: Batch, ends: EndGradients) -> Float[Tensor, " row"]:
        """One curvature product for each row: nothing is shared."""
        t = model.point.state
        if model.point is ends.point:
            gradients = ends.gradients
        else:
            gradients = model.gradients(batch)
        first_order = model.scaled_inner_product(ends.gradients, gradients)
        return first_order - t * model.bilinear(ends.gradients, gradients)

    def change(self, model: LocalModel, gradient: Callable[[Tree], Tree]) -> Tree:
        """One curvature product for all rows."""
        t = model.point.state
        step = model.point.scaled(gradient(model.point.trained))
        product = model.differences(model.proxy.gradient, model.point.trained, step)
        correction = each(lambda tensor: -t * tensor, model.point.scaled(product))
        return add(step, correction)


@final
class Published(Form):
    """The second-order correction alone, divided by T, as the paper has it."""

    name = "published"
    pairs_at_observed_state = False

    def factor(self, steps: int) -> float:
        """Every state counts 1/m."""
        del steps
        return 1.0

    def scores(self, model: LocalModel, gradients: Sequence[Tree]) -> Scores:
        """By symmetry one product serves all rows; each row adds one difference of its own."""
        t = model.point.state
        stack = concatenate(gradients)
        scaled = model.point.scaled(stack)
        curved = model.scaled_curvature_product(stack)

        def terms(batch: Batch) -> Tensor:
            # H_z D G_B and G_z of every row, from the same two evaluations.
            difference, rows = model.along_step(lambda trained: model.rows.each(batch, trained))
            return -t * (inner_products(curved, rows) + inner_products(scaled, difference))

        return terms

    def own(self, model: LocalModel, batch: Batch, ends: EndGradients) -> Float[Tensor, " row"]:
        """One curvature product for each row: nothing is shared."""
        del ends
        t = model.point.state
        difference, rows = model.along_step(lambda trained: model.rows.each(batch, trained))
        through_proxy = model.bilinear(rows, rows)
        through_row = model.scaled_inner_product(rows, difference)
        return -t * (through_proxy + through_row)

    def change(self, model: LocalModel, gradient: Callable[[Tree], Tree]) -> Tree:
        """One curvature product for all rows, and one difference of their gradient."""
        t = model.point.state
        difference, total = model.along_step(gradient)
        product = model.differences(
            model.proxy.gradient, model.point.trained, model.point.scaled(total)
        )
        both = model.point.scaled(add(product, difference))
        return each(lambda tensor: -t * tensor, both)
