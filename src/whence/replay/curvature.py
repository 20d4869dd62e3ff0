r"""Products with the curvature of one step's loss.

The gradient of a step, as a function of parameters, buffers and sample weights, has one transposed derivative that
holds everything a reverse sweep needs: with a the cotangent of the gradient and b that of the buffers,

.. math:: (\nabla^2 L\, a + B_\theta^\top b,\quad \partial_B,\quad c_b \langle a, \nabla \ell_b \rangle)

No per-sample gradient is formed, and losses that couple the samples of a batch (BatchNorm, contrastive) are exact.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.func import vjp

from whence.replay.transition import Piece
from whence.tree import Tree

# (cotangent of the gradient, of the running buffers) -> (curvature product, of the running buffers, scores [slot])
Pull = Callable[[Tree, Tree], tuple[Tree, Tree, Tensor]]


@dataclass(frozen=True, slots=True)
class Linearised:
    """A piece's gradient at one point, the losses `[slot]`, the buffers it leaves, and its transposed derivative."""

    gradient: Tree
    buffers: Tree
    losses: Tensor
    pull: Pull


class Curvature(abc.ABC):
    """Says how the loss's second derivative is taken in a reverse sweep."""

    @abc.abstractmethod
    def linearise(self, piece: Piece, params: Tree, buffers: Tree, *, weights: Tensor) -> Linearised:
        """Gradient of a piece and its transposed derivative at the given point."""


@final
@dataclass(frozen=True, slots=True)
class Hessian(Curvature):
    r"""The exact product :math:`\nabla^2 L\, a`, by reverse mode over reverse mode.

    Right for smooth networks, early steps and long runs. Prefer another policy where the training is not smooth at the
    scale of one sample (ReLU with Adam): the exact derivative is then right and yet a poor guide to a removal.
    """

    def linearise(self, piece: Piece, params: Tree, buffers: Tree, *, weights: Tensor) -> Linearised:
        """Gradient of a piece and its exact transposed derivative."""
        transition = piece.transition
        carried = {name: buffers[name] for name in transition.task.running if name in buffers}
        trained = {name: params[name] for name in transition.trained}

        def gradient(part: Tree, running: Tree, w: Tensor) -> tuple[tuple[Tree, Tree], tuple[Tree, Tensor]]:
            value, after, losses = piece.gradient(params | part, buffers | running, w)
            return (value, {name: after[name] for name in carried}), (after, losses)

        (value, _), pull, (after, losses) = vjp(gradient, trained, carried, weights, has_aux=True)  # type: ignore[misc]
        return Linearised(value, after, losses, lambda a, b: pull((a, b)))
