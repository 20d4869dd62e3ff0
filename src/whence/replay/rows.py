"""Small gradients of samples: from the uses of parameters in a pass, and the cotangents of what came of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from whence.replay.sides import Sides
from whence.replay.uses import Use
from whence.task import Batch

Loss = Callable[[Any, Batch], Tensor]  # outputs, batch -> [slot]
Reductions = Mapping[str, Sides]
Asked = tuple[Loss | None, Reductions]  # of which loss (None: the task's), and made small how
Cotangents = Mapping[GradientEdge, Tensor | None]
Parts = dict[str, Tensor]  # [slot, rank] by parameter
Rows = tuple[Float[Tensor, "slot rank"], ...]  # by what was asked


@final
class Gathered:
    """Sums up small gradients over the uses of their parameters.

    Args:
        losses: of which one or another small form will be added (None: the task's, weighted with shares of a step's).
    """

    def __init__(self, losses: Sequence[Loss | None]) -> None:
        self._losses = losses
        self._parts: list[Parts] = [{} for _ in losses]

    def add(self, use: Use, condensed: Mapping[Loss | None, Tensor], sides: Sequence[Sides]) -> None:
        """Add what follows from a use.

        Args:
            use: of a parameter.
            condensed: what the use keeps of its cotangent under each loss; losses that are not there add nothing.
            sides: of the parameter, by place in `losses`.
        """
        places = [place for place, loss in enumerate(self._losses) if loss in condensed]
        factors = _factors(use, [sides[place] for place in places])
        for loss, kept in condensed.items():
            ours = [place for place in places if self._losses[place] is loss]
            found = use.rows(kept, [factors[id(sides[place])] for place in ours], [sides[place] for place in ours])
            for place, rows in zip(ours, found, strict=True):
                part = self._parts[place]
                part[use.name] = part[use.name] + rows if use.name in part else rows

    def parts(self, share: Float[Tensor, " slot"]) -> list[Parts]:
        """By place in `losses`, of single losses: without the shares that the task's was weighted with."""
        inverse = torch.where(share != 0, 1 / share, 0)[:, None]
        return [
            {name: part * inverse for name, part in parts.items()} if loss is None else parts
            for loss, parts in zip(self._losses, self._parts, strict=True)
        ]


def _factors(use: Use, sides: Sequence[Sides]) -> dict[int, Tensor]:
    """The use's other factor by reduction, each made once."""
    apart = list({id(one): one for one in sides}.values())
    return {id(one): factor for one, factor in zip(apart, use.factors(apart), strict=True)}


def parts_of(
    uses: Sequence[Use],
    cotangents: Mapping[Loss | None, Cotangents],
    asked: Sequence[Asked],
    *,
    share: Float[Tensor, " slot"],
) -> list[Parts]:
    """Small gradients by what was asked, from the cotangents of all uses."""
    found = Gathered([loss for loss, _ in asked])
    for use in uses:
        given = {loss: b for loss, of_loss in cotangents.items() if (b := of_loss[use.edge]) is not None}
        if given and all(use.name in reductions for _, reductions in asked):
            kept = {loss: use.condensed(b) for loss, b in given.items()}
            found.add(use, kept, [reductions[use.name] for _, reductions in asked])
    return found.parts(share)


def row_of(parts: Parts, reductions: Reductions, *, like: Float[Tensor, " slot"]) -> Float[Tensor, "slot rank"]:
    """All parameters behind each other; those that were not used have zeros."""
    zeros = (like.new_zeros(len(like), one.rank) for one in reductions.values())
    return torch.cat([parts.get(name, zero) for name, zero in zip(reductions, zeros, strict=True)], 1)
