r"""The gradient of every sample's loss at a step, made small by projection, beside the gradient of the step itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from whence.replay.sides import Sides
from whence.replay.transition import Piece
from whence.task import Batch
from whence.tree import Tree

Loss = Callable[[Any, Batch], Tensor]  # outputs, batch -> [slot]
Reductions = Mapping[str, Sides]


@final
@dataclass(frozen=True, slots=True)
class Captured:
    """What one pass over a micro-batch found.

    Attributes:
        rows: projected gradients of the samples' losses (not divided by the batch), by loss and by set of reductions,
            each `[slot, layer-rank]`; of no slots where the update did not consume the piece.
        losses: the task's losses `[slot]`, as `Piece.loss` gives them.
        gradient: the piece's part of the step's gradient, like that of `Piece.gradient`.
        buffers: as the forward pass left them.
    """

    rows: tuple[tuple[Float[Tensor, "slot rank"], ...], ...]
    losses: Float[Tensor, " slot"]
    gradient: Tree
    buffers: Tree


def captured(
    piece: Piece,
    params: Tree,
    buffers: Tree,
    *,
    sides: Sequence[Reductions],
    losses: Sequence[Loss] = (),
) -> Captured:
    """Capture the projected gradients of a micro-batch's samples.

    Args:
        piece: the micro-batch; its modules are put into the recorded modes.
        params: where the gradients are taken.
        buffers: before the forward pass.
        sides: sets of reductions, all of the same parameters in the same order; parameters that the step does not move
            have zeros.
        losses: further losses, read off the same outputs.
    """
    task = piece.transition.task
    leaves = {name: params[name].detach().requires_grad_() for name in piece.transition.moving}
    with torch.enable_grad(), piece.transition.replaying(twice=False):
        with piece.randomness():
            outputs, after = task.outputs(params | leaves, buffers, piece.batch)
            own = task.losses_of(outputs, piece.batch)
        if not piece.counted:
            own = own.detach()[:0]
        total = piece.weighted(own, None)
        if piece.index == 0 and task.penalty is not None:
            total = total + task.penalty(params | leaves)
        every = [own, *(loss(outputs, piece.batch) if piece.counted else own for loss in losses)]
        rows = tuple(_rows(one, leaves, sides) for one in every)
        gradient = _gradient(total, leaves)
    return Captured(rows, own.detach(), gradient, {name: tensor.detach() for name, tensor in after.items()})


def _rows(losses: Tensor, leaves: Tree, sides: Sequence[Reductions]) -> tuple[Tensor, ...]:
    """Slot by slot."""
    found: list[list[Tensor]] = [[] for _ in sides]
    for loss in losses:
        slopes = _gradient(loss, leaves)
        for rows, reductions in zip(found, sides, strict=True):
            rows.append(_reduced(slopes, reductions, losses))
    widths = [sum(one.rank for one in reductions.values()) for reductions in sides]
    return tuple(
        torch.stack(rows) if rows else losses.new_zeros(0, width) for rows, width in zip(found, widths, strict=True)
    )


def _reduced(slopes: Tree, reductions: Reductions, like: Tensor) -> Tensor:
    parts = [
        one.reduce(slopes[name][None])[0] if name in slopes else like.new_zeros(one.rank)
        for name, one in reductions.items()
    ]
    return torch.cat(parts)


def _gradient(loss: Tensor, leaves: Tree) -> Tree:
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))
