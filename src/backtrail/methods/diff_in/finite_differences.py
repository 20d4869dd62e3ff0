r"""The derivative of a function along a direction, by differences of its values: Diff-In's only second derivative.

.. math:: H v \approx \frac{\nabla L(\theta + \epsilon \hat v) - \nabla L(\theta - \epsilon \hat v)}{2 \epsilon}
    \|v\|, \qquad \hat v = v / \|v\|

Published is the one-sided form, :math:`(\nabla L(\theta + \epsilon \hat v) - \nabla L(\theta))
\|v\| / \epsilon`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from backtrail.tree import Tree, each

Sides = Literal["central", "one-sided"]
TINY = 1e-12  # a shorter direction has no derivative along it


@final
@dataclass(frozen=True, slots=True)
class Differences:
    """How derivatives are taken: how far the parameters are moved (a length, whatever the direction's), to which sides.

    In double precision central differences move a hundredth as far: their error falls with the
    square of the length, and there is room before rounding takes over. One-sided ones are as
    published.

    >>> cube = lambda tree: {"y": tree["x"] ** 3}
    >>> at = {"x": torch.ones(1, dtype=torch.float64)}
    >>> round(Differences()(cube, at, {"x": 2 * at["x"]})["y"].item(), 5)
    6.0
    """

    epsilon: float = 1e-3
    sides: Sides = "central"

    def __call__(self, function: Callable[[Tree], Tree], at: Tree, direction: Tree) -> Tree:
        """Derivative of a function of parameters along a direction; traceable by `vmap` in the direction."""
        return self.around(function, at, direction)[0]

    def around(
        self, function: Callable[[Tree], Tree], at: Tree, direction: Tree
    ) -> tuple[Tree, Tree]:
        """The derivative and, at no further cost, the value: the mean of both sides, if central, as exact."""
        size = length(direction)
        nothing, far = size < TINY, self.move(size.dtype)
        scale = torch.where(nothing, torch.zeros_like(size), size)
        step = far / torch.where(nothing, torch.ones_like(size), size)
        moved = {name: tensor * step for name, tensor in direction.items()}
        ahead = function({name: at[name] + tensor for name, tensor in moved.items()})
        if self.sides == "central":
            behind, apart = (
                function({name: at[name] - tensor for name, tensor in moved.items()}),
                2 * far,
            )
        else:
            behind, apart = function({name: at[name] for name in moved}), far
        slope = {name: (tensor - behind[name]) * (scale / apart) for name, tensor in ahead.items()}
        middle = 0.5 if self.sides == "central" else 0.0
        return slope, {
            name: torch.lerp(behind[name], tensor, middle) for name, tensor in ahead.items()
        }

    def move(self, dtype: torch.dtype) -> float:
        """How far the parameters are moved in a precision."""
        fine = dtype == torch.float64 and self.sides == "central"
        return self.epsilon / 100 if fine else self.epsilon


def length(tree: Tree) -> Tensor:
    """Euclidean norm over all entries, which overflows for no finite ones.

    >>> length({"w": torch.tensor([3e30, 4e30])})
    tensor(5.0000e+30)
    """
    tensors = [tensor for tensor in tree.values() if tensor.numel()]
    largest = torch.stack([tensor.abs().amax() for tensor in tensors]).amax()
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    squares = torch.stack([(tensor / unit).square().sum() for tensor in tensors]).sum()
    return unit * squares.sqrt()


def precise(tree: Tree) -> Tree:
    """The same in float32 where it is coarser: differences of half-precision numbers are noise."""
    coarse = (torch.bfloat16, torch.float16)
    return each(lambda tensor: tensor.float() if tensor.dtype in coarse else tensor, tree)


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 out of products and convolutions: its rounding is larger than the differences."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
