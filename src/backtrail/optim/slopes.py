r"""How the derivative of an update with respect to the gradient is taken.

Either at a point, or as a mean over the width of one sample.

Adam's update is nearly the sign of a gradient: flat almost everywhere, and up to :math:`1/\epsilon`
steep where the gradient is near zero. Its derivative describes an infinitely small change. Leaving
a sample out is not such a change: it moves an entry of the gradient by about :math:`s = \sigma /
n`, with n slots and :math:`\sigma` the spread of one sample's gradient. The mean over n samples has
:math:`\mathrm{rms}(g) \approx \sigma / \sqrt n`, so :math:`s \approx \mathrm{rms}(g) / \sqrt n`.
"""

import abc
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail import arguments
from backtrail.optim.flatten import FlatChunk
from backtrail.optim.jacobian import GRADIENT, Diagonals, FlatUpdate, jacobian
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.tree import Tree, cast


class UpdateDerivative(abc.ABC):
    r"""Says how an update is differentiated with respect to the gradient.

    With U the update and g the gradient that it consumes, a reverse sweep multiplies cotangents by

    .. math:: \frac{\partial U}{\partial g} = \lim_{s \to 0} \frac{U(g + s) - U(g - s)}{2 s}

    or by the same quotient at a finite s. `Tangent` takes the limit, `Secant` a width of about one
    sample.
    """

    @abc.abstractmethod
    def diagonals(
        self, update: Update, state: State, grads: Tree, *, chunk: FlatChunk, slots: int
    ) -> Diagonals:
        """Differentiate the update's outputs by its inputs, at a chunk's entries.

        Args:
            update: Of the step.
            state: Before the step.
            grads: The gradient that the optimizer consumes.
            chunk: The entries.
            slots: Number of slots of the step.
        """


@final
@dataclass(frozen=True, slots=True)
class Tangent(UpdateDerivative):
    r"""The derivative at the gradient of the step, :math:`U'(g)`: the infinitesimal change.

    Together with the curvature `Hessian` it makes a sweep the exact derivative of the training.

    >>> Tangent()
    Tangent()
    """

    def diagonals(
        self, update: Update, state: State, grads: Tree, *, chunk: FlatChunk, slots: int
    ) -> Diagonals:
        """Take the exact derivative, by `torch.optim` in its differentiable mode."""
        del slots
        return jacobian(update, state, grads, chunk=chunk)


@final
@dataclass(frozen=True, slots=True)
class Secant(UpdateDerivative):
    r"""The mean derivative over the width of one sample's removal, which is a secant.

    .. math:: \frac{U(g + s) - U(g - s)}{2 s} = \frac{1}{2 s} \int_{-s}^{s} U'(g + x)\, dx,
        \qquad s = \mathrm{width} \cdot \mathrm{rms}(g) / \sqrt n

    with the root mean square over a parameter's entries. For SGD it is the derivative. For Adam and
    similar optimizers it predicts removals better, and is no longer the derivative of the training.
    Only the derivative with respect to the gradient is replaced; those with respect to parameters
    and moments stay exact.

    >>> Secant(width=2.0)
    Secant(width=2.0)

    Args:
        width: How many samples wide.

    Raises:
        BadSetting: The width is not positive.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        """Check the width.

        Raises:
            BadSetting: It is not positive.
        """
        width = arguments.positive("width", self.width, "a positive number of samples")
        object.__setattr__(self, "width", width)  # the dataclass is frozen

    def diagonals(
        self, update: Update, state: State, grads: Tree, *, chunk: FlatChunk, slots: int
    ) -> Diagonals:
        """Take the exact derivative, with the part by the gradient replaced by the secant."""
        exact = jacobian(update, state, grads, chunk=chunk)
        s = self._sizes(grads, chunk) / slots**0.5
        flat = FlatUpdate.of(update, state, grads, chunk=chunk)
        # Both updates start from the same parameter and moments; only g moves by s.
        # In float32 the parameter would swallow the difference of two small steps.
        inputs = cast(flat.inputs, torch.float64)
        upper = flat.outputs(inputs | {GRADIENT: inputs[GRADIENT] + s})
        lower = flat.outputs(inputs | {GRADIENT: inputs[GRADIENT] - s})
        diagonals = dict(exact)
        for (output, source), derivative in exact.items():
            if source == GRADIENT:
                secant = (upper[output] - lower[output]) / (2 * s)
                # A parameter whose whole gradient is zero has no width to average over.
                secant = torch.where(s > 0, secant, derivative)
                diagonals[output, source] = secant.to(derivative)
        return diagonals

    def _sizes(self, grads: Tree, chunk: FlatChunk) -> Float[Tensor, " entry"]:
        """Width times rms(g) of the parameter that each entry belongs to, in float64."""
        sizes = []
        for part in chunk.slices:
            root_mean_square = grads[part.name].double().square().mean().sqrt()
            sizes.append((self.width * root_mean_square).expand(part.stop - part.start))
        return torch.cat(sizes)
