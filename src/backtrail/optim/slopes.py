r"""How the optimizer's answer to a change of the gradient is measured: at a point, or over the width of one sample.

Adam's update is nearly the sign of a gradient: flat almost everywhere, and up to 1 / eps steep
where the gradient is near zero. Its derivative tells what an infinitely small change does. Leaving
a sample out is no such change: it moves an entry of the gradient by about :math:`s = \sigma / n`,
with n slots and :math:`\sigma` the spread of one sample's gradient, which a mean over n shows as
:math:`s \approx \mathrm{rms}(g) / \sqrt n`.
"""

import abc
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from backtrail.errors import BadSetting
from backtrail.optim.flatten import FlatChunk
from backtrail.optim.jacobian import GRADIENT, Entries, alone_at, jacobian, moved
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.tree import Tree, cast


class Slope(abc.ABC):
    """Says how steep an update is."""

    @abc.abstractmethod
    def entries(
        self, update: Update, state: State, grads: Tree, *, chunk: FlatChunk, slots: int
    ) -> Entries:
        """The update's outputs by its inputs, at a strand's entries, in a step with so many slots."""


@final
@dataclass(frozen=True, slots=True)
class Tangent(Slope):
    """The derivative: what an infinitely small change does."""

    def entries(
        self, update: Update, state: State, grads: Tree, *, chunk: FlatChunk, slots: int
    ) -> Entries:
        """By `torch.optim` in its differentiable mode."""
        del slots
        return jacobian(update, state, grads, chunk=chunk)


@final
@dataclass(frozen=True, slots=True)
class Secant(Slope):
    r"""The mean derivative over the width of one sample's removal, which is a secant.

    .. math:: \frac{U(g + s) - U(g - s)}{2 s} = \frac{1}{2 s} \int_{-s}^{s} U'(g + x)\, dx,
        \qquad s = \mathrm{width} \cdot \mathrm{rms}(g) / \sqrt n

    with the root mean square over a parameter's entries. For SGD it is the derivative. For Adam and
    its kin it predicts removals better, and is no longer the derivative of the training. Only the
    gradient is moved; the update's answer to parameters and moments stays the derivative.

    Args:
        width: how many samples wide.

    Raises:
        BadSetting: the width is not positive.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a width of nothing.

        Raises:
            BadSetting: the width is not positive.
        """
        if not self.width > 0:
            raise BadSetting("width", self.width, "a positive number of samples")

    def entries(
        self, update: Update, state: State, grads: Tree, *, chunk: FlatChunk, slots: int
    ) -> Entries:
        """The derivative, with the column of the gradient replaced."""
        entries = jacobian(update, state, grads, chunk=chunk)
        size = self._sizes(grads, chunk) / slots**0.5
        alone, inputs, counts = alone_at(update, state, grads, chunk=chunk)
        # In float32 the parameter would swallow the difference of two small steps.
        inputs = cast(inputs, torch.float64)
        up, down = (
            moved(alone, inputs | {GRADIENT: inputs[GRADIENT] + x}, counts) for x in (size, -size)
        )
        return entries | {
            (output, source): torch.where(
                size > 0, (up[output] - down[output]) / (2 * size), entry
            ).to(entry)
            for (output, source), entry in entries.items()
            if source == GRADIENT
        }

    def _sizes(self, grads: Tree, chunk: FlatChunk) -> Tensor:
        """Width times rms(g) of the parameter that each entry belongs to."""
        roots = {
            span.name: grads[span.name].double().square().mean().sqrt() for span in chunk.spans
        }
        return torch.cat(
            [self.width * roots[span.name].expand(span.stop - span.start) for span in chunk.spans]
        )
