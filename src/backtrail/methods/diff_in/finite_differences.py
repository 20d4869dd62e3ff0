r"""Directional derivatives by finite differences: the only second derivative that Diff-In takes.

.. math::
    H v \approx \frac{\nabla L(\theta + \epsilon \hat v) - \nabla L(\theta - \epsilon \hat v)}
    {2 \epsilon} \|v\|, \qquad \hat v = v / \|v\|

The paper uses the one-sided form,
:math:`(\nabla L(\theta + \epsilon \hat v) - \nabla L(\theta)) \|v\| / \epsilon`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from backtrail.tree import Tree, each

Sides = Literal["central", "one-sided"]
# A direction shorter than this counts as zero, and so does the derivative along it.
SHORTEST_DIRECTION = 1e-12


@final
@dataclass(frozen=True, slots=True)
class Differences:
    """How derivatives along a direction are taken.

    In double precision, central differences move a hundredth as far as `epsilon`: their error
    falls with the square of the distance, and rounding is still far away. One-sided differences
    move as far as the paper says in any precision.

    Args:
        epsilon: Distance by which the parameters are moved, whatever the length of the direction.
        sides: "central", or "one-sided" as published.

    >>> cube = lambda tree: {"y": tree["x"] ** 3}
    >>> at = {"x": torch.ones(1, dtype=torch.float64)}
    >>> round(Differences()(cube, at, {"x": 2 * at["x"]})["y"].item(), 5)
    6.0
    """

    epsilon: float = 1e-3
    sides: Sides = "central"

    def __call__(self, function: Callable[[Tree], Tree], at: Tree, direction: Tree) -> Tree:
        """Derivative of a function along a direction of its parameters; works under `vmap`."""
        derivative, _ = self.derivative_and_value(function, at, direction)
        return derivative

    def derivative_and_value(
        self, function: Callable[[Tree], Tree], at: Tree, direction: Tree
    ) -> tuple[Tree, Tree]:
        """Derivative along a direction, and the value of the function without a further call.

        With central differences the value is the mean of both sides, which is as accurate as the
        derivative; with one-sided ones it is the value itself.
        """
        size = length(direction)
        distance = self.distance(size.dtype)
        # Both branches of `where` are computed under vmap, so zero lengths are replaced by one
        # before the division, and the result is multiplied by zero.
        is_zero = size < SHORTEST_DIRECTION
        divisor = torch.where(is_zero, torch.ones_like(size), size)
        scale = torch.where(is_zero, torch.zeros_like(size), size)
        step = distance / divisor
        offset = {name: tensor * step for name, tensor in direction.items()}

        ahead = function({name: at[name] + tensor for name, tensor in offset.items()})
        if self.sides == "central":
            behind = function({name: at[name] - tensor for name, tensor in offset.items()})
            gap = 2 * distance
            middle = 0.5
        else:
            behind = function({name: at[name] for name in offset})
            gap = distance
            middle = 0.0

        derivative = {}
        value = {}
        for name, tensor in ahead.items():
            derivative[name] = (tensor - behind[name]) * (scale / gap)
            value[name] = torch.lerp(behind[name], tensor, middle)
        return derivative, value

    def distance(self, dtype: torch.dtype) -> float:
        """Distance by which parameters of this precision are moved."""
        if dtype == torch.float64 and self.sides == "central":
            return self.epsilon / 100
        return self.epsilon


def length(tree: Tree) -> Tensor:
    """Euclidean norm over all entries, without overflow where the result itself is finite.

    >>> length({"w": torch.tensor([3e30, 4e30])})
    tensor(5.0000e+30)
    """
    tensors = [tensor for tensor in tree.values() if tensor.numel()]
    largest = torch.stack([tensor.abs().amax() for tensor in tensors]).amax()
    # The squares are taken of entries divided by the largest one.
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    squares = torch.stack([(tensor / unit).square().sum() for tensor in tensors]).sum()
    return unit * squares.sqrt()


def at_least_float32(tree: Tree) -> Tree:
    """Convert half-precision tensors to float32: differences of such numbers are mostly noise."""
    half = (torch.bfloat16, torch.float16)
    return each(lambda tensor: tensor.float() if tensor.dtype in half else tensor, tree)


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn TF32 off in products and convolutions: its rounding exceeds the differences."""
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
