r"""Curvature by the chain rule: what bends is only the end of the loss, seen through a linearised beginning.

The network is cut at its *ends* e: its outputs, or already the samples' losses. With J their derivative by the
parameters and K a curvature of what is left, the product with a is :math:`J^\top K J a`.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from whence.errors import NoOutputs
from whence.replay.linearised import Linearised, Product, Tensors, differentiated, free, leaves, nudged, transposed
from whence.replay.smooth import Smooth
from whence.replay.transition import Piece
from whence.replay.twice import straight
from whence.tree import Tree, add


@dataclass(frozen=True, slots=True)
class Head:
    """What is left of a piece's loss after its ends.

    Attributes:
        slopes: of the loss by the ends.
        curve: from a tangent of the ends to K times it (nothing where K is zero), and the scores `[slot]`.
        losses: of the samples, `[slot]`.
    """

    slopes: Tensors
    curve: Callable[[Tensors], tuple[Tensors, Tensor]]
    losses: Tensor


class Cut(abc.ABC):
    """Says where a network ends, and how what follows bends."""

    @abc.abstractmethod
    def ends(self, piece: Piece, outputs: Any) -> Tensors:
        """The ends, out of what the model returned."""

    @abc.abstractmethod
    def head(self, piece: Piece, outputs: Any, weights: Tensor) -> Head:
        """The loss as a function of the ends, at these sample weights."""


@final
class AtOutputs(Cut):
    """Cut at the model's outputs: K is the loss's second derivative by them, the Gauss-Newton matrix."""

    def ends(self, piece: Piece, outputs: Any) -> Tensors:
        """All floating tensors among the outputs.

        Raises:
            NoOutputs: there are none.
        """
        del piece
        found = tuple(leaf for leaf in tree_flatten(outputs)[0] if _floating(leaf))
        if not found:
            raise NoOutputs(type(outputs).__name__)
        return found

    def head(self, piece: Piece, outputs: Any, weights: Tensor) -> Head:
        """By one transposed derivative of the slopes with respect to ends and weights."""
        leaves, spec = tree_flatten(outputs)

        def loss(ends: Tensors, w: Tensor) -> tuple[Tensor, Tensor]:
            given = iter(ends)
            filled = [next(given) if _floating(leaf) else leaf for leaf in leaves]
            losses = piece.transition.task.losses_of(tree_unflatten(filled, spec), piece.batch)
            return piece.weighted(losses, w), losses

        ends = tuple(end.detach() for end in self.ends(piece, outputs))
        slopes, curve, losses = vjp(grad(loss, has_aux=True), ends, weights, has_aux=True)  # type: ignore[misc]
        return Head(slopes, curve, losses)


@final
@dataclass(frozen=True, slots=True)
class AtLosses(Cut):
    """Cut at the samples' losses: K = diag(c w), the empirical Fisher matrix, or K = 0."""

    bends: bool

    def ends(self, piece: Piece, outputs: Any) -> Tensors:
        """The losses."""
        return (piece.transition.task.losses_of(outputs, piece.batch),)

    def head(self, piece: Piece, outputs: Any, weights: Tensor) -> Head:
        """A weighted sum."""
        (losses,) = self.ends(piece, outputs)
        share = piece.share.to(losses)

        def curve(tangent: Tensors) -> tuple[Tensors, Tensor]:
            scores = share * tangent[0]
            return (weights * scores,) if self.bends else (), scores

        return Head((share * weights,), curve, losses.detach())


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def through(piece: Piece, params: Tree, buffers: Tree, *, weights: Tensor, cut: Cut, product: Product) -> Linearised:
    """Gradient of a piece, and products with the curvature of what follows a cut; a penalty keeps its own."""
    if not piece.counted:  # only its running statistics matter, and their way is exact
        return differentiated(piece, params, buffers, weights=weights)
    with Smooth():
        begun = Beginning.of(piece, params, buffers, cut=cut)
    with torch.enable_grad(), piece.randomness():
        head = cut.head(piece, begun.outputs, weights)
    gradient, push = begun.sloped(head.slopes, twice=product == "autograd")
    if product == "difference":
        push = _differences(piece, params, buffers, cut=cut)
    slope, bend = penalty_of(piece, params)

    def pull(a: Tree, b: Tree) -> tuple[Tree, Tree, Tensor]:
        curved, scores = head.curve(push(a))
        second, before = begun.pull(curved, b)
        return add(second, bend(a)) if curved else second, before, scores

    value = {name: tensor + slope[name] if name in slope else tensor for name, tensor in gradient.items()}
    return Linearised(value, {name: tensor.detach() for name, tensor in begun.after.items()}, head.losses, pull)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The graph of one forward pass up to the cut, with parameters and running statistics as its leaves."""

    moving: Tree
    trained: Tree
    running: Tree
    outputs: Any
    ends: Tensors
    after: Tree

    @staticmethod
    def of(piece: Piece, params: Tree, buffers: Tree, *, cut: Cut) -> "Beginning":
        """Run it forward once."""
        trained, running = (leaves(tree) for tree in free(piece, params, buffers))
        with torch.enable_grad(), piece.randomness():
            outputs, after = piece.transition.task.outputs(params | trained, buffers | running, piece.batch)
            ends = cut.ends(piece, outputs)
        moving = {name: trained[name] for name in piece.transition.moving}
        return Beginning(moving, trained, running, outputs, ends, after)

    def sloped(self, slopes: Tensors, *, twice: bool) -> tuple[Tree, Callable[[Tree], Tensors]]:
        """The gradient, and from a direction a of the parameters to the tangent J a of the ends.

        The gradient is linear in the slopes, so J a is its transposed derivative by them: no forward mode needed.
        """
        knobs = tuple(slope.detach().requires_grad_(twice) for slope in slopes)
        with torch.enable_grad(), straight():
            found = transposed(self.ends, tuple(self.moving.values()), knobs, create_graph=twice)
        gradient = dict(zip(self.moving, found, strict=True))

        def push(a: Tree) -> Tensors:
            return transposed(tuple(gradient.values()), knobs, tuple(a[name] for name in gradient))

        return {name: tensor.detach() for name, tensor in gradient.items()}, push

    def pull(self, curved: Tensors, b: Tree) -> tuple[Tree, Tree]:
        """From cotangents of the ends (or none) and of the statistics left (or none) to those of the leaves."""
        sources = (*self.trained.values(), *self.running.values())
        outputs = (*self.ends[: len(curved)], *(self.after[name] for name in b))
        if not outputs:
            return {}, {}
        found = transposed(outputs, sources, (*curved, *b.values()))
        split = len(self.trained)
        return dict(zip(self.trained, found[:split], strict=True)), dict(zip(self.running, found[split:], strict=True))


def _differences(piece: Piece, params: Tree, buffers: Tree, *, cut: Cut) -> Callable[[Tree], Tensors]:
    """J a by the ends of two forward passes."""
    trained, _ = free(piece, params, buffers)

    def push(a: Tree) -> Tensors:
        size, moved = nudged(trained, a)
        with torch.no_grad():
            up, down = (_ends_at(piece, params | moved(sign), buffers, cut=cut) for sign in (1.0, -1.0))
        return tuple((left - right) / (2 * size) for left, right in zip(up, down, strict=True))

    return push


def _ends_at(piece: Piece, params: Tree, buffers: Tree, *, cut: Cut) -> Tensors:
    with piece.randomness():
        outputs, _ = piece.transition.task.outputs(params, buffers, piece.batch)
        return cut.ends(piece, outputs)


def penalty_of(piece: Piece, params: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Slope and exact curvature of the task's penalty, in the piece that carries it."""
    penalty = piece.transition.task.penalty
    if piece.index != 0 or penalty is None:
        return {}, lambda _: {}
    slope, curved = vjp(grad(penalty), params)  # type: ignore[misc]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    names = piece.transition.trained

    def bend(a: Tree) -> Tree:
        (found,) = curved(zeros | a)
        return {name: found[name] for name in names}

    return slope, bend
