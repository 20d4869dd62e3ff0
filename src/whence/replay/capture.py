r"""The gradient of every sample's loss at a step, made small by projection, beside the gradient of the step itself.

One forward pass and one backward pass serve both, with training's own kernels. Every operation that uses a parameter
is watched, and the small gradients follow from its inputs and from the cotangents of its outputs (`uses.py`). That
watching is a guess about layouts, so it proves itself: with random weights :math:`\omega` of the samples,

.. math:: \sum_b \omega_b\, P(\nabla\ell_b) = P(\nabla \sum_b \omega_b \ell_b)

must hold for every parameter. It is asked again whenever the parameters are used in another way, and at steps 1, 2, 4,
8, ... Parameters for which it does not hold (in a recurrent layer, say) are differentiated sample by sample.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from whence.errors import CoupledLoss, listed
from whence.replay.sides import Sides
from whence.replay.transition import Piece
from whence.replay.uses import Use
from whence.replay.watching import Watching
from whence.task import Batch
from whence.tree import Tree, norm

log = logging.getLogger(__name__)
Loss = Callable[[Any, Batch], Tensor]  # outputs, batch -> [slot]
Reductions = Mapping[str, Sides]
Parts = dict[str, Tensor]  # [slot, rank] by parameter

AGREES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative difference that counts as none
# What was proven about a model: the ways in which it used its parameters, and those that are not explained by that.
_PROVEN: "WeakKeyDictionary[nn.Module, dict[Hashable, frozenset[str]]]" = WeakKeyDictionary()


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
    piece: Piece, params: Tree, buffers: Tree, *, sides: Sequence[Reductions], losses: Sequence[Loss] = ()
) -> Captured:
    r"""Capture the projected gradients of a micro-batch's samples.

    With BatchNorm in train mode every loss depends on every sample; the rows then take the batch's statistics for
    constants (the step's gradient does not). Elsewhere they are exact. A slot whose share of the step's loss is zero
    has a row of zeros under the task's loss.

    Args:
        piece: the micro-batch; its modules are put into the recorded modes.
        params: where the gradients are taken.
        buffers: before the forward pass.
        sides: sets of reductions, all of the same parameters in the same order; parameters that the step does not move
            have zeros.
        losses: further losses, read off the same outputs.

    Raises:
        CoupledLoss: the loss of one sample depends on the outputs of another.
    """
    if not piece.counted:
        return _without_rows(piece, params, buffers, sides=sides, count=1 + len(losses))
    moving = piece.transition.moving
    leaves = {name: params[name].detach().requires_grad_() for name in moving}
    with torch.enable_grad(), piece.transition.replaying(twice=False):
        watching = Watching(leaves, len(piece.share), piece.batch)
        with piece.randomness():
            with watching:
                outputs, after = piece.transition.task.outputs(params | leaves, buffers, piece.batch)
            own = piece.transition.task.losses_of(outputs, piece.batch)
        every = [own, *(loss(outputs, piece.batch) for loss in losses)]
        view = _Pass(piece, leaves, watching.uses, outputs, every)
        gradient, rows = view.captured(sides)
        if watching.froze:
            gradient, after, own = piece.gradient(params, buffers, None)
        elif piece.index == 0:
            gradient = _with_penalty(piece, params, gradient)
    return Captured(rows, own.detach(), gradient, {name: tensor.detach() for name, tensor in after.items()})


def _without_rows(piece: Piece, params: Tree, buffers: Tree, *, sides: Sequence[Reductions], count: int) -> Captured:
    with piece.transition.replaying(twice=False):
        gradient, after, losses = piece.gradient(params, buffers, None)
    like = next(iter(params.values()))
    empty = tuple(like.new_zeros(0, sum(one.rank for one in reductions.values())) for reductions in sides)
    return Captured((empty,) * count, losses, gradient, after)


def _with_penalty(piece: Piece, params: Tree, gradient: Tree) -> Tree:
    penalty = piece.transition.task.penalty
    if penalty is None:
        return gradient
    leaves = {name: params[name].detach().requires_grad_() for name in gradient}
    found = _slopes(penalty(params | leaves), leaves)
    return {name: tensor + found[name] for name, tensor in gradient.items()}


@final
@dataclass(frozen=True, slots=True)
class _Pass:
    """A forward pass that was watched, and the losses read off it."""

    piece: Piece
    leaves: Tree
    uses: list[Use]
    outputs: Any
    losses: list[Tensor]

    def captured(self, sides: Sequence[Reductions]) -> tuple[Tree, tuple[tuple[Tensor, ...], ...]]:
        """The gradient of the piece without penalty, and rows by loss and reductions."""
        edges = list(dict.fromkeys(use.edge for use in self.uses))
        share = self.piece.share.to(self.losses[0])
        found = _grads((self.losses[0] * share).sum(), [*edges, *self.leaves.values()])
        gradient = {
            name: torch.zeros_like(leaf) if slope is None else slope
            for (name, leaf), slope in zip(self.leaves.items(), found[len(edges) :], strict=True)
        }
        cotangents = [dict(zip(edges, found[: len(edges)], strict=True))]
        cotangents += [dict(zip(edges, _grads(loss.sum(), edges), strict=True)) for loss in self.losses[1:]]
        parts = self.parts(cotangents, sides)
        inverse = torch.where(share != 0, 1 / share, 0)[:, None]
        parts[0] = [{name: part * inverse for name, part in of_set.items()} for of_set in parts[0]]
        failed = self.unproven(parts[0][0], sides[0])
        rows = [
            tuple(
                self.joined(part, failed, loss=loss, reductions=one) for part, one in zip(of_loss, sides, strict=True)
            )
            for loss, of_loss in zip(self.losses, parts, strict=True)
        ]
        return gradient, tuple(rows)

    def parts(
        self, cotangents: Sequence[Mapping[Any, Tensor | None]], sides: Sequence[Reductions]
    ) -> list[list[Parts]]:
        """Small gradients by loss, set of reductions and parameter, summed over the parameter's uses."""
        found: list[list[Parts]] = [[{} for _ in sides] for _ in cotangents]
        for use in self.uses:
            reductions = [one[use.name] for one in sides if use.name in one]
            if not reductions:
                continue
            factors = use.factors(reductions)
            for of_loss, of_edge in zip(found, cotangents, strict=True):
                b = of_edge[use.edge]
                if b is None:
                    continue
                for parts, rows in zip(of_loss, use.rows(b, factors, reductions), strict=True):
                    parts[use.name] = parts[use.name] + rows if use.name in parts else rows
        return found

    def joined(self, parts: Parts, failed: frozenset[str], *, loss: Tensor, reductions: Reductions) -> Tensor:
        """All parameters behind each other; those that failed one sample at a time."""
        alone = {name: self.leaves[name] for name in failed if name in reductions}
        if alone:
            slopes = [_slopes(one, alone) for one in loss]
            stacked = {name: torch.stack([each[name] for each in slopes]) for name in alone}
            parts = parts | {name: reductions[name].reduce(stacked[name]) for name in alone}
        zeros = (loss.new_zeros(len(loss), one.rank) for one in reductions.values())
        return torch.cat([parts.get(name, zero) for name, zero in zip(reductions, zeros, strict=True)], 1)

    def unproven(self, parts: Parts, reductions: Reductions) -> frozenset[str]:
        """Parameters whose rows are not those of their gradients."""
        known = _PROVEN.setdefault(self.piece.transition.task.binding, {})
        number = self.piece.transition.step.index
        kind = (tuple(reductions), tuple(use.kind for use in self.uses))
        if kind not in known or number & (number - 1) == 0:
            known[kind] = self.proven_wrong(parts, reductions)
            if known[kind]:
                log.info("differentiated sample by sample: %s", listed(sorted(known[kind]), most=6))
        return known[kind]

    def proven_wrong(self, parts: Parts, reductions: Reductions) -> frozenset[str]:
        own = self.losses[0]
        random = torch.Generator().manual_seed(self.piece.transition.step.index)
        omega = (1 + torch.rand(len(own), generator=random)).to(own) * (self.piece.share.to(own) != 0)
        self.refuse_coupled(omega)
        slopes = _slopes((omega * own).sum(), self.leaves)
        agrees = AGREES.get(own.dtype, 1e-3)
        # A gradient that cancels (of a bias before softmax, say) is rounding of others.
        rounding = 100 * torch.finfo(own.dtype).eps * norm(slopes)
        wrong = set()
        for name in slopes.keys() & reductions.keys():
            wanted = reductions[name].reduce(slopes[name][None])[0]
            rows = parts.get(name, wanted.new_zeros(len(own), len(wanted))) * omega[:, None]
            allowed = agrees * (rows.norm(dim=1).sum() + wanted.norm()) + rounding
            if not (rows.sum(0) - wanted).norm() <= allowed:
                wrong.add(name)
        return frozenset(wrong)

    def refuse_coupled(self, omega: Tensor) -> None:
        """Every sample's loss must be read off its own outputs.

        Raises:
            CoupledLoss: it is not.
        """
        ends = [end for end in tree_leaves(self.outputs) if isinstance(end, Tensor) and end.requires_grad]
        own = self.losses[0]
        pairs = [_grads(loss.sum(), ends) for loss in (own, omega * own)]
        for plain, weighted in zip(*pairs, strict=True):
            axes = () if plain is None else [axis for axis, size in enumerate(plain.shape) if size == len(own)]
            if axes and not any(_separable(plain, weighted, omega=omega, axis=axis) for axis in axes):
                raise CoupledLoss


def _separable(plain: Tensor | None, weighted: Tensor | None, *, omega: Tensor, axis: int) -> bool:
    """Whether weights of the losses are weights along an axis of their cotangents."""
    assert plain is not None and weighted is not None
    wanted = (plain.movedim(axis, -1) * omega).movedim(-1, axis)
    return bool((weighted - wanted).norm() <= AGREES.get(plain.dtype, 1e-3) * wanted.norm())


def _grads(loss: Tensor, inputs: Sequence[Any]) -> list[Tensor | None]:
    """The graph is kept, and what the loss does not depend on has none."""
    if not loss.requires_grad or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True))


def _slopes(loss: Tensor, leaves: Tree) -> Tree:
    found = _grads(loss, list(leaves.values()))
    return {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }
