"""Small gradients of samples: from the uses of parameters in a pass, and the cotangents of what came of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from whence.replay.sides import Sides
from whence.replay.uses import Use
from whence.task import Batch

Loss = Callable[[Any, Batch], Tensor]  # outputs, batch -> [slot]
Reductions = Mapping[str, Sides]
Parts = dict[str, Tensor]  # [slot, rank] by parameter
Cotangents = Mapping[GradientEdge, Tensor | None]
Rows = tuple[tuple[Float[Tensor, "slot rank"], ...], ...]  # by loss and by set of reductions


def parts_of(uses: Sequence[Use], cotangents: Sequence[Cotangents], sides: Sequence[Reductions]) -> list[list[Parts]]:
    """Small gradients by loss, set of reductions and parameter, summed over the parameter's uses."""
    found: list[list[Parts]] = [[{} for _ in sides] for _ in cotangents]
    for use in uses:
        reductions = [one[use.name] for one in sides if use.name in one]
        if not reductions:
            continue
        factors = use.factors(reductions)
        for of_loss, of_edge in zip(found, cotangents, strict=True):
            b = of_edge[use.edge]
            small = [] if b is None else use.rows(b, factors, reductions)
            for parts, rows in zip(of_loss, small, strict=False):
                parts[use.name] = parts[use.name] + rows if use.name in parts else rows
    return found


def unshared(of_loss: Sequence[Parts], share: Float[Tensor, " slot"]) -> list[Parts]:
    """Small gradients of single losses, of which the cotangents were weighted with their shares of a step's loss."""
    inverse = torch.where(share != 0, 1 / share, 0)[:, None]
    return [{name: part * inverse for name, part in of_set.items()} for of_set in of_loss]


def row_of(parts: Parts, reductions: Reductions, *, like: Float[Tensor, " slot"]) -> Float[Tensor, "slot rank"]:
    """All parameters behind each other; those that were not used have zeros."""
    zeros = (like.new_zeros(len(like), one.rank) for one in reductions.values())
    return torch.cat([parts.get(name, zero) for name, zero in zip(reductions, zeros, strict=True)], 1)
