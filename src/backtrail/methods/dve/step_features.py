"""What Data Value Embedding wants to know of a step: small gradients of its samples, and what the update makes of them.

What the update makes of a gradient is a number per entry (`lasting.py`). Where that is the same for
all entries of a parameter, or where a mask picks entries, it is a number per coordinate of the
projection. Elsewhere it is taken as the product of a number per row and one per column, which a
projection of a matrix's two sides lets through: rows and columns are scaled before they are mixed.
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
from backtrail.optim.steady_state import Lasting, lasting
from backtrail.persample.gradients import Watched
from backtrail.persample.rules import Asked, Loss, Reductions
from backtrail.persample.sketch import KroneckerSketch, Picked
from backtrail.step.state import State
from backtrail.step.step import MicroBatch
from backtrail.step.update import LINEAR, Update
from backtrail.task.clipping import ClipValue
from backtrail.task.task import Task
from backtrail.tree import Tree

Fisher = Literal["true", "empirical"]
Follow = Literal["optimizer", "rate"]
Arrays = dict[str, Tensor]
ROUNDING = 1e-5  # of a sample's gradient: a step's gradient below it is none
LOOKED_AT = 2**13  # entries of a parameter, for their median


@final
@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What is gathered at every step, and how.

    Attributes:
        task: of the training.
        optimizer: its class's name.
        shapes: of all parameters.
        projection: of the trained ones.
        fisher: whether the curvature is made of the samples' own gradients, or of those with drawn
            labels.
        follow: whether the update is the optimizer's, or a plain step by its learning rate.
        draws: whose labels are drawn, if any.
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
        """Whether the update is one number per coordinate."""
        uniform = self.optimizer in LINEAR and not isinstance(self.task.clip, ClipValue)
        return self.follow == "rate" or uniform or picks(self.projection)

    def sizes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """The arrays of a step."""
        drawn = self.draws.count(slots) if self.partly else slots
        true, small = self.fisher == "true", not self.plain
        found = {"fisher": (drawn, self.projection.rank)}
        found |= {"fisher_moved": found["fisher"]} if true and small else {}
        found |= (
            {"moved" if small else "gradient": (slots, self.projection.rank)}
            if true or small
            else {}
        )
        shares = {"share": slots} | ({"fisher_share": drawn} if self.partly else {})
        lengths = shares | {"rate": self.projection.rank, "decay": self.projection.rank}
        return {**found, **{name: (length,) for name, length in lengths.items()}}

    def drawn(self, step: int, micro_batch: int) -> Loss | None:
        """The loss with drawn labels, where it is read off the outputs of all samples."""
        return (
            self.draws.loss(step, micro_batch)
            if self.fisher == "true" and not self.partly
            else None
        )

    @property
    def partly(self) -> bool:
        """Whether the curvature is made of some samples, in a pass of their own."""
        return self.fisher == "true" and self.draws.portion < 1

    def asked(self, drawn: Loss | None, scaled: Reductions | None) -> dict[str, Asked]:
        """What arrays a micro-batch's rows are kept in.

        Args:
            drawn: its loss with drawn labels, where the curvature is made of those.
            scaled: reductions of gradients as the update moves them; None where it is one number
                per coordinate.
        """
        small = self.projection.sides
        own: dict[str, Asked] = (
            {"gradient": (None, small)} if scaled is None else {"moved": (None, scaled)}
        )
        if self.partly:
            return own
        if drawn is None:
            return {"fisher": (None, small)} | ({} if scaled is None else own)
        return self.of_drawn(drawn, scaled) | own

    def of_drawn(self, drawn: Loss, scaled: Reductions | None) -> dict[str, Asked]:
        """Those that the curvature is made of."""
        found: dict[str, Asked] = {"fisher": (drawn, self.projection.sides)}
        return found if scaled is None else found | {"fisher_moved": (drawn, scaled)}

    def some_drawn(
        self,
        micro_batch: MicroBatch,
        params: Tree,
        buffers: Tree,
        *,
        scaled: Reductions | None,
        seen: Watched | None = None,
    ) -> Arrays:
        """Those, of the chosen samples of a micro-batch; see `Chosen.rows`."""
        asked = self.of_drawn(
            self.draws.loss(micro_batch.transition.step.index, micro_batch.index), scaled
        )
        return self.draws.chosen(micro_batch.transition).rows(
            micro_batch, params, buffers, asked=asked, seen=seen
        )

    def scaled(self, rate: Tree) -> dict[str, KroneckerSketch]:
        """The projection of gradients as the update moves them, of these parameters."""
        found = factors(self.projection, rate)
        return {name: self.projection.sides[name].scaled(*found[name]) for name in rate}

    def arrays(
        self,
        rows: Sequence[Arrays],
        micro_batches: Sequence[MicroBatch],
        *,
        total: Tree,
        response: Lasting,
    ) -> Arrays:
        """All that is kept of a step.

        Args:
            rows: of its micro-batches.
            micro_batches: the micro-batches.
            total: the step's gradient.
            response: what the update makes of lasting changes.
        """
        names = dict.fromkeys(name for of_piece in rows for name in of_piece)
        joined = {name: torch.cat([one[name] for one in rows if name in one]) for name in names}
        contributes = [micro_batch for micro_batch in micro_batches if micro_batch.contributes]
        shares = {"share": torch.cat([micro_batch.share for micro_batch in contributes])}
        if self.partly:
            chosen = self.draws.chosen(micro_batches[0].transition)
            shares["fisher_share"] = torch.cat(
                [chosen.share(micro_batch) for micro_batch in contributes]
            )
        return (
            self._without_rounding(joined, total)
            | shares
            | {
                "rate": self._by_coordinate(response.rate, absent=0.0),
                "decay": self._by_coordinate(response.decay, absent=1.0),
            }
        )

    def response(self, update: Update, state: State, gradient: Tree) -> Lasting:
        """What the update makes of lasting changes, given the step's gradient before clipping, or a part of it."""
        if self.follow == "optimizer":
            response = lasting(self.task, update, state, grads=gradient)
            return replace(
                response,
                rate={n: at_most_usual(rate, gradient[n]) for n, rate in response.rate.items()},
            )
        by_group = zip(update.groups, rates(update.settings), strict=True)
        rate = {
            name: torch.full_like(gradient[name], r)
            for group, r in by_group
            for name in group
            if name in gradient
        }
        return Lasting(rate, {name: torch.ones_like(tensor) for name, tensor in rate.items()})

    def _without_rounding(self, rows: Arrays, total: Tree) -> Arrays:
        """Drop the rows of a bias in front of BatchNorm, say: frozen statistics show it a gradient where there is none.

        Adam would divide it by the rounding that is there instead.
        """
        if self.task.running:
            for name, place in self.projection.layout.items():
                usual = rows["fisher"][:, place].square().sum(1).mean().sqrt()
                if name in total and total[name].norm() <= ROUNDING * usual:
                    for tensor in rows.values():
                        tensor[:, place] = 0.0
        return rows

    def _by_coordinate(self, tree: Tree, absent: float) -> Float[Tensor, " coordinate"]:
        """A number of every entry as one of every coordinate: that of the picked entry, or the parameter's mean."""
        names = self.projection.layout
        like = next(iter(tree.values()))
        if picks(self.projection):
            full = {
                n: tree[n] if n in tree else like.new_full(self.shapes[n], absent) for n in names
            }
            return self.projection.of_diagonal(full)
        means = {
            name: tree[name].mean() if name in tree else like.new_tensor(absent) for name in names
        }
        return torch.cat(
            [means[name].expand(place.stop - place.start) for name, place in names.items()]
        )


def at_most_usual(rate: Tensor, gradient: Tensor) -> Tensor:
    """A parameter's rates, none larger than their median where there is a gradient (of thousands of its entries).

    Adam divides an entry that hardly ever had a gradient by almost nothing, but only until it gets
    one: what it is divided by grows with it. Here that counts as fixed, and so may not be taken at
    its word.

    >>> at_most_usual(torch.tensor([1.0, 2.0, 1e6, 0.1]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    tensor([1.0000, 2.0000, 2.0000, 0.1000])
    """
    every = -(-rate.numel() // LOOKED_AT) | 1  # odd, so that it meets every column of most matrices
    some = rate.flatten()[::every][gradient.flatten()[::every] != 0].abs()
    usual = float(some.median()) if len(some) else 0.0
    return rate.clamp(-usual, usual) if usual > 0 else rate


def picks(whole: Projection) -> bool:
    """Whether a projection picks entries and mixes none."""
    every = (
        side
        for sides in whole.sides.values()
        for side in (sides.left, sides.right)
        if side is not None
    )
    return all(isinstance(side, Picked) for side in every)


def factors(whole: Projection, rate: Tree) -> dict[str, tuple[Tensor, ...]]:
    r"""Numbers of parameters as products of one for the row and one for the column, of vectors as they are.

    .. math:: d_{ij} \approx \exp(\overline{\log d}_{i \cdot} + \overline{\log d}_{\cdot j} - \overline{\log d})
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, numbers in rate.items():
        sides = whole.sides[name]
        matrix = sides.right is not None
        found[name] = (
            _outer(numbers.reshape(sides.left.size, -1)) if matrix else (numbers.flatten(),)
        )
    return found


def _outer(matrix: Float[Tensor, "left right"]) -> tuple[Tensor, Tensor]:
    # Where a schedule begins or ends at zero, all numbers are zero, and so are their products.
    logs = matrix.abs()
    least = (1e-12 * logs.max()).clamp_min(torch.finfo(matrix.dtype).tiny)
    logs.clamp_min_(least).log_()
    left = (logs.mean(1) - logs.mean()).exp()
    return left * matrix.sum().sign(), logs.mean(0).exp()
