"""Dropout that draws under torch.func the mask that it draws without.

torch fills a mask in the order in which the input lies in memory. Under `torch.func` that order is
lost, so a transposed input (in every `nn.TransformerEncoderLayer(batch_first=True)`) gets another
mask from the same generator. So the mask is drawn outside of the transforms, for a tensor that lies
in memory as the input does.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode


class SameDropout(TorchFunctionMode):
    """While entered, `torch.nn.functional.dropout` draws the same mask under any transform."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute a dropout here, and call every other function as it is."""
        if function is not dropout:
            return function(*args, **(kwargs or {}))
        call = signature(dropout).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        return _dropout(**call.arguments)


def _dropout(input: Tensor, *, p: float, training: bool, inplace: bool) -> Tensor:
    if not training or p == 0:
        return input
    ones = _ones_laid_out_like(input)
    with temporarily_clear_interpreter_stack():
        mask = dropout(ones, p)
    return input.mul_(mask) if inplace else input * mask


def _ones_laid_out_like(tensor: Tensor) -> Tensor:
    """Ones in the memory order that `torch.empty_like` uses; under vmap without the mapped axis."""
    axes = list(range(tensor.dim()))
    # The expanded axes of a tensor have stride 0, and torch lays such a tensor out row by row.
    is_expanded = any(tensor.stride(axis) == 0 for axis in axes if tensor.shape[axis] > 1)
    if not is_expanded:
        axes.sort(key=tensor.stride, reverse=True)
    shape = [tensor.shape[axis] for axis in axes]
    ones = torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
    return ones.permute([axes.index(axis) for axis in range(tensor.dim())])
