"""Gradient clipping, as loops do it between the backward pass and the optimizer's step."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from backtrail import arguments
from backtrail.errors import BadSetting
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class ClipNorm:
    r"""Gradient clipping by total norm, as `torch.nn.utils.clip_grad_norm_` does it.

    .. math:: g \leftarrow g \cdot \min\!\left(1, \frac{\texttt{max\_norm}}{\|g\| + 10^{-6}}\right)

    >>> ClipNorm(1.0)({"w": torch.tensor([3.0, 4.0])})
    {'w': tensor([0.6000, 0.8000])}
    """

    max_norm: float
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            BadSetting: One is not positive; both may be infinite.
        """
        for name in ("max_norm", "norm_type"):
            # The dataclass is frozen. numpy's and torch's numbers become plain ones.
            object.__setattr__(self, name, _positive(name, getattr(self, name)))

    def __call__(self, grads: Tree) -> Tree:
        """Scale all gradients by min(1, max_norm / norm)."""
        scale = self._scale(grads)
        return {name: g * scale for name, g in grads.items()}

    def diagonal(self, grads: Tree) -> Tree:
        """Diagonal of the clipping Jacobian, treating the norm as constant."""
        scale = self._scale(grads)
        return {name: scale.expand_as(g) for name, g in grads.items()}

    def _scale(self, grads: Tree) -> Tensor:
        norms = [torch.linalg.vector_norm(g, self.norm_type) for g in grads.values()]
        total = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
        # torch adds 1e-6 to the norm, and a replay has to make the same update.
        return torch.clamp(self.max_norm / (total + 1e-6), max=1.0)


@final
@dataclass(frozen=True, slots=True)
class ClipValue:
    """Gradient clipping entry by entry, as `torch.nn.utils.clip_grad_value_` does it.

    >>> ClipValue(1.0)({"w": torch.tensor([3.0, -0.5])})
    {'w': tensor([ 1.0000, -0.5000])}
    """

    max_value: float

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            BadSetting: It is not positive; it may be infinite.
        """
        # The dataclass is frozen. numpy's and torch's numbers become plain ones.
        object.__setattr__(self, "max_value", _positive("max_value", self.max_value))

    def __call__(self, grads: Tree) -> Tree:
        """Clamp every entry to [-max_value, max_value]."""
        return {name: g.clamp(-self.max_value, self.max_value) for name, g in grads.items()}

    def diagonal(self, grads: Tree) -> Tree:
        """Diagonal of the clipping Jacobian: 1 where an entry is within the bounds, else 0."""
        return {name: (g.abs() <= self.max_value).to(g) for name, g in grads.items()}


def _positive(name: str, value: object) -> float:
    """A positive number, or infinity, with which torch's functions clip nothing.

    Raises:
        BadSetting: It is something else.
    """
    number = arguments.as_real(value)
    if number is None or not number > 0:
        raise BadSetting(name, value, "a positive number")
    return number
