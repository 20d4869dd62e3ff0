r"""Layers that say themselves how they are differentiated twice.

A layer y = f(x) is pulled back by :math:`\bar x = f'(x)^\top \bar y`, and a sweep differentiates that again for every
query. torch does so from scratch, in a dozen passes for GELU and in thirty for LayerNorm or attention. A `Layer` takes
what is the same for every query once a step. Third derivatives, which only a model that differentiates itself asks
for, are left to torch.
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vjp

Tensors = tuple[Tensor, ...]
Maybe = tuple[Tensor | None, ...]
Needs = tuple[bool, ...]  # which derivatives are asked for, by input
Bend = Callable[[Any, Needs], Iterator[Tensor | None]]

LARGE = 2**15  # entries from which on a pass over them costs more than a call from Python
_straight: ContextVar[bool] = ContextVar("straight", default=False)


@contextmanager
def straight() -> Iterator[None]:
    """While it is entered, what is pulled back is recorded as a function of its cotangents alone, not of the layers."""
    before = _straight.set(True)
    try:
        yield
    finally:
        _straight.reset(before)


class Layer(abc.ABC):
    """A function f, and at the point x that it was called at, its transposed derivative and the derivative of that."""

    @abc.abstractmethod
    def plain(self, *inputs: Tensor) -> Tensor:
        """The function as torch has it."""

    @abc.abstractmethod
    def value(self, *inputs: Tensor) -> Tensor:
        """Its value, which settles the point."""

    @abc.abstractmethod
    def pull(self, slope: Tensor, needs: Needs) -> Maybe:
        """From a cotangent of the value to those of the inputs; others than are asked for may be left out."""

    @abc.abstractmethod
    def bend(self, slope: Tensor) -> Bend:
        """From a to the derivatives of <a, pull(slope)>: by the slope, and then, if they are asked for, by the inputs.

        What is the same for every a is kept.
        """

    def bend_plainly(self, a: Maybe, slope: Tensor, inputs: Tensors) -> Tensors:
        """The same by torch, to be differentiated again."""

        def pull(slope: Tensor, *inputs: Tensor) -> Tensors:
            found: Tensors = vjp(self.plain, *inputs)[1](slope)
            return tuple(tensor for tensor, one in zip(found, a, strict=True) if one is not None)

        bent: Tensors = vjp(pull, slope, *inputs)[1](tuple(one for one in a if one is not None))
        return bent


def alone() -> bool:
    """Whether no transform of the model's own is at work, nor a compiler, which puts passes together by itself."""
    return torch._C._functorch.maybe_current_level() is None and not torch.compiler.is_compiling()


def large(entries: int) -> bool:
    """Whether a layer of so many is worth its calls from Python."""
    return entries >= LARGE


def one_precision(inputs: Tensors) -> bool:
    """Whether a layer computes in the precision of its inputs."""
    full = inputs[0].dtype in {torch.float32, torch.float64} and not torch.is_autocast_enabled(inputs[0].device.type)
    return full and len({(tensor.dtype, tensor.is_nested) for tensor in inputs}) == 1 and not inputs[0].is_nested


def recorded(layer: Layer, *inputs: Tensor) -> Tensor:
    """The layer's value at these inputs, differentiated as it says."""
    value: Tensor = _Value.apply(layer, *inputs)  # type: ignore[no-untyped-call]
    return value


class _Value(Function):
    """f(x)."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, *inputs: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*inputs)
        value = layer.value(*(tensor.detach() for tensor in inputs))
        # A view that was made in here could not be overwritten, as by an activation in place.
        return torch.ops.aten._unsafe_view(value, value.shape) if value._is_view() else value

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *ctx.layer.pull(slope, needs)
        inputs = (tensor.detach() if _straight.get() else tensor for tensor in ctx.saved_tensors)
        return None, *_Pulled.apply(ctx.layer, needs, slope, *inputs)  # type: ignore[no-untyped-call]


class _Pulled(Function):
    """The transposed derivative of f at x, applied to a slope."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, *point: Any) -> Maybe:
        needs, slope, *inputs = point
        ctx.layer, ctx.bend = layer, None
        ctx.save_for_backward(slope, *inputs)
        return layer.pull(slope, needs)

    @staticmethod
    def backward(ctx: Any, *a: Tensor | None) -> Maybe:
        if torch.is_grad_enabled():
            slope, *inputs = ctx.saved_tensors
            return None, None, *ctx.layer.bend_plainly(a, slope, tuple(inputs))
        if ctx.bend is None:
            ctx.bend = ctx.layer.bend(ctx.saved_tensors[0].detach())
        needs = ctx.needs_input_grad[3:]
        bent = ctx.bend(a, needs)
        if not any(needs):
            return None, None, next(bent), *(None for _ in needs)
        return None, None, *bent
