"""What is gathered of a step: projected per-sample gradients, and what the update makes of them.

What the update makes of a gradient is a number per entry (`optim/steady_state.py`). Where that is
the same for all entries of a parameter, or where a mask picks entries, it is a number per
coordinate of the projection ("plain" below). Elsewhere it is approximated by the product of a
number per row and a number per column, which passes through the projection of a matrix's two sides:
rows and columns are scaled before they are mixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.methods.dve.projection import Projection
from backtrail.methods.dve.sampled_labels import Drawn
from backtrail.methods.step_factors import rates
from backtrail.optim.steady_state import SteadyState, steady_state
from backtrail.persample.gradients import TracedPass
from backtrail.persample.rules import Loss, Reductions, Request
from backtrail.persample.sketch import KroneckerSketch, Picked
from backtrail.step.optimizers import rule_named
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.step.update import Update
from backtrail.task.clipping import ClipValue
from backtrail.task.task import Task
from backtrail.tree import Tree

Fisher = Literal["true", "empirical"]
Follow = Literal["optimizer", "rate"]
Arrays = dict[str, Tensor]
# A step's gradient below this share of a sample's usual gradient consists of rounding errors.
ROUNDING = 1e-5
# Entries of a parameter that its median is taken of, at most.
MEDIAN_ENTRIES = 2**13


@final
@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What is gathered at every step, and how.

    Attributes:
        task: Of the training.
        optimizer: Name of its class.
        shapes: Of all parameters.
        projection: Of the trained parameters.
        fisher: Whether the curvature consists of the samples' own gradients ("empirical"), or of
            gradients with labels sampled from the model ("true").
        follow: Whether the update is the optimizer's, or plain gradient descent at its rate.
        draws: Whose labels are sampled, if any.
    """

    task: Task
    optimizer: str
    shapes: Mapping[str, tuple[int, ...]]
    projection: Projection
    fisher: Fisher
    follow: Follow
    draws: Drawn

    @property
    def plain(self) -> bool:
        """Whether what the update makes of a gradient is one number per coordinate."""
        if self.follow == "rate":
            return True
        clips_entries = isinstance(self.task.clip, ClipValue)
        is_uniform = rule_named(self.optimizer).linear and not clips_entries
        return is_uniform or picks(self.projection)

    @property
    def partly(self) -> bool:
        """Whether the curvature consists of some samples only, which have a pass of their own."""
        return self.fisher == "true" and self.draws.portion < 1

    def sizes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a step's arrays, by name, for so many slots.

        The names are those of `requested` and `arrays`.
        """
        rank = self.projection.rank
        fisher_rows = self.draws.count(slots) if self.partly else slots
        sizes: dict[str, tuple[int, ...]] = {"fisher": (fisher_rows, rank)}
        if self.fisher == "true" and not self.plain:
            sizes["fisher_moved"] = (fisher_rows, rank)
        if not self.plain:
            sizes["moved"] = (slots, rank)
        elif self.fisher == "true":
            sizes["gradient"] = (slots, rank)
        sizes["share"] = (slots,)
        if self.partly:
            sizes["fisher_share"] = (fisher_rows,)
        sizes["rate"] = (rank,)
        sizes["decay"] = (rank,)
        return sizes

    def sampled_loss(self, step: int, micro_batch: int) -> Loss | None:
        """The loss with sampled labels, where it is read off the outputs of all samples."""
        if self.fisher == "true" and not self.partly:
            return self.draws.loss(step, micro_batch)
        return None

    def requested(self, sampled: Loss | None, scaled: Reductions | None) -> dict[str, Request]:
        """The arrays that a micro-batch's rows are kept in, each with its loss and reductions.

        Args:
            sampled: The loss with sampled labels, where the curvature consists of those.
            scaled: Reductions of gradients as the update moves them; None where that is one number
                per coordinate.
        """
        sides = self.projection.sides
        own: dict[str, Request] = {}
        if scaled is None:
            own["gradient"] = (None, sides)
        else:
            own["moved"] = (None, scaled)
        if self.partly:
            return own
        if sampled is not None:
            return self.requested_of_sampled(sampled, scaled) | own
        # With the empirical Fisher matrix the curvature consists of the samples' own gradients.
        fisher: dict[str, Request] = {"fisher": (None, sides)}
        return fisher if scaled is None else fisher | own

    def requested_of_sampled(self, sampled: Loss, scaled: Reductions | None) -> dict[str, Request]:
        """The arrays of rows that the curvature consists of."""
        requested: dict[str, Request] = {"fisher": (sampled, self.projection.sides)}
        if scaled is not None:
            requested["fisher_moved"] = (sampled, scaled)
        return requested

    def rows_of_chosen(
        self,
        micro_batch: MicroBatch,
        params: Tree,
        buffers: Tree,
        *,
        scaled: Reductions | None,
        seen: TracedPass | None = None,
    ) -> Arrays:
        """Rows with sampled labels of the chosen samples of a micro-batch; see `Chosen.rows`."""
        step = micro_batch.transition.step.index
        sampled = self.draws.loss(step, micro_batch.index)
        chosen = self.draws.chosen(micro_batch.transition)
        requested = self.requested_of_sampled(sampled, scaled)
        return chosen.rows(micro_batch, params, buffers, asked=requested, seen=seen)

    def scaled(self, rate: Tree) -> dict[str, KroneckerSketch]:
        """Sketches of gradients as the update moves them, of the parameters in `rate`."""
        by_parameter = factors(self.projection, rate)
        return {name: self.projection.sides[name].scaled(*by_parameter[name]) for name in rate}

    def arrays(
        self,
        rows: Sequence[Arrays],
        micro_batches: Sequence[MicroBatch],
        *,
        total: Tree,
        response: SteadyState,
    ) -> Arrays:
        """All that is kept of a step.

        Args:
            rows: Of its micro-batches.
            micro_batches: The micro-batches.
            total: The step's gradient.
            response: What the update makes of lasting changes of it.
        """
        names = dict.fromkeys(name for arrays in rows for name in arrays)
        joined = {
            name: torch.cat([arrays[name] for arrays in rows if name in arrays]) for name in names
        }
        arrays = self._without_rounding(joined, total)
        contributing = [batch for batch in micro_batches if batch.contributes]
        arrays["share"] = torch.cat([batch.share for batch in contributing])
        if self.partly:
            chosen = self.draws.chosen(micro_batches[0].transition)
            arrays["fisher_share"] = torch.cat([chosen.share(batch) for batch in contributing])
        arrays["rate"] = self._by_coordinate(response.rate, absent=0.0)
        arrays["decay"] = self._by_coordinate(response.decay, absent=1.0)
        return arrays

    def response(self, update: Update, state: State, gradient: Tree) -> SteadyState:
        """What the update makes of lasting changes of gradient and parameters.

        Args:
            update: The step's update.
            state: The state before the step.
            gradient: The step's gradient before clipping, or some parameters' part of it.
        """
        if self.follow == "optimizer":
            response = steady_state(self.task, update, state, grads=gradient)
            bounded = {
                name: at_most_usual(rate, gradient[name]) for name, rate in response.rate.items()
            }
            return replace(response, rate=bounded)
        rate = {}
        for group, group_rate in zip(update.groups, rates(update.settings), strict=True):
            for name in group:
                if name in gradient:
                    rate[name] = torch.full_like(gradient[name], group_rate)
        return SteadyState(rate, {name: torch.ones_like(tensor) for name, tensor in rate.items()})

    def _without_rounding(self, rows: Arrays, total: Tree) -> Arrays:
        """Set rows of parameters to zero whose gradient consists of rounding errors, in place.

        A bias in front of BatchNorm has no effect in training, but frozen statistics show the
        samples gradients of it, which Adam would divide by the rounding error of their sum.
        """
        if not self.task.running:
            return rows
        for name, place in self.projection.layout.items():
            usual = rows["fisher"][:, place].square().sum(1).mean().sqrt()
            if name in total and total[name].norm() <= ROUNDING * usual:
                for tensor in rows.values():
                    tensor[:, place] = 0.0
        return rows

    def _by_coordinate(self, tree: Tree, absent: float) -> Float[Tensor, " coordinate"]:
        """Turn a number for every entry into one for every coordinate.

        That is the number of the picked entry, or else the parameter's mean.

        Args:
            tree: Numbers by parameter.
            absent: Number of parameters that are not in the tree.
        """
        layout = self.projection.layout
        like = next(iter(tree.values()))
        if picks(self.projection):
            full = {}
            for name in layout:
                full[name] = (
                    tree[name] if name in tree else like.new_full(self.shapes[name], absent)
                )
            return self.projection.of_diagonal(full)
        parts = []
        for name, place in layout.items():
            mean = tree[name].mean() if name in tree else like.new_tensor(absent)
            parts.append(mean.expand(place.stop - place.start))
        return torch.cat(parts)


def at_most_usual(rate: Tensor, gradient: Tensor) -> Tensor:
    """Bound a parameter's rates by the median of those where there is a gradient.

    Adam divides an entry that hardly ever had a gradient by almost nothing, but only until it gets
    one, since the divisor grows with it. The divisor counts as fixed here, so that such rates
    would be far too large.

    >>> at_most_usual(torch.tensor([1.0, 2.0, 1e6, 0.1]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    tensor([1.0000, 2.0000, 2.0000, 0.1000])
    """
    # Every so many entries; an odd number, so that all columns of most matrices are met.
    stride = -(-rate.numel() // MEDIAN_ENTRIES) | 1
    sampled_rates = rate.flatten()[::stride]
    has_gradient = gradient.flatten()[::stride] != 0
    usable = sampled_rates[has_gradient].abs()
    if not len(usable):
        return rate
    usual = float(usable.median())
    if usual <= 0:
        return rate
    return rate.clamp(-usual, usual)


def picks(whole: Projection) -> bool:
    """Whether a projection picks entries and mixes none."""
    for sketch in whole.sides.values():
        for side in (sketch.left, sketch.right):
            if side is not None and not isinstance(side, Picked):
                return False
    return True


def factors(whole: Projection, rate: Tree) -> dict[str, tuple[Tensor, ...]]:
    r"""Approximate the numbers of matrices by products of row and column factors.

    .. math::
        d_{ij} \approx
        \exp(\overline{\log d}_{i \cdot} + \overline{\log d}_{\cdot j} - \overline{\log d})

    The numbers of vectors are returned as they are.
    """
    by_parameter: dict[str, tuple[Tensor, ...]] = {}
    for name, numbers in rate.items():
        sketch = whole.sides[name]
        if sketch.right is None:
            by_parameter[name] = (numbers.flatten(),)
        else:
            by_parameter[name] = _row_and_column(numbers.reshape(sketch.left.size, -1))
    return by_parameter


def _row_and_column(matrix: Float[Tensor, "left right"]) -> tuple[Tensor, Tensor]:
    # Where a schedule begins or ends at zero, all numbers are zero, and so are the products.
    sizes = matrix.abs()
    smallest = (1e-12 * sizes.max()).clamp_min(torch.finfo(matrix.dtype).tiny)
    logs = sizes.clamp_min_(smallest).log_()
    row = (logs.mean(1) - logs.mean()).exp()
    column = logs.mean(0).exp()
    return row * matrix.sum().sign(), column
