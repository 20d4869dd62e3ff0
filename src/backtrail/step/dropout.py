"""Dropout that draws under torch.func what it draws without.

torch fills a mask in the order in which the input lies in memory; under `torch.func` it loses that
order, and a transposed input (in every `nn.TransformerEncoderLayer(batch_first=True)`) gets another
mask from the same generator. So the mask is drawn outside, for a tensor that lies as the input
does.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode


class SameDropout(TorchFunctionMode):
    """While it is entered, `torch.nn.functional.dropout` draws the same mask whatever transforms it is under."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draw the mask of a dropout; leave all else as it is."""
        if function is not dropout:
            return function(*args, **(kwargs or {}))
        call = signature(dropout).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        return _dropped(**call.arguments)


def _dropped(input: Tensor, *, p: float, training: bool, inplace: bool) -> Tensor:
    if not training or p == 0:
        return input
    ones = _lying_like(input)
    with temporarily_clear_interpreter_stack():
        mask = dropout(ones, p)
    return input.mul_(mask) if inplace else input * mask


def _lying_like(tensor: Tensor) -> Tensor:
    """Ones in the order in which `torch.empty_like` lays entries out; under vmap without the stack's axis."""
    axes = list(range(tensor.dim()))
    if all(
        tensor.stride(axis) for axis in axes if tensor.shape[axis] > 1
    ):  # an expanded tensor is laid out in rows
        axes.sort(key=tensor.stride, reverse=True)
    rows = torch.ones(
        [tensor.shape[axis] for axis in axes], dtype=tensor.dtype, device=tensor.device
    )
    return rows.permute([axes.index(axis) for axis in range(tensor.dim())])
