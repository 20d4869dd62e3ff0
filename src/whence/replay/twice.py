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
Bend = Callable[[Tensors], Iterator[Tensor]]

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
    def pull(self, slope: Tensor) -> Tensors:
        """From a cotangent of the value to those of the inputs."""

    @abc.abstractmethod
    def bend(self, slope: Tensor, pulled: Tensors) -> Bend:
        """From a to the derivatives of <a, pull(slope)>: by the slope, and then, if they are asked for, by the inputs.

        What is the same for every a is kept.
        """

    def bend_plainly(self, a: Tensors, slope: Tensor, inputs: Tensors) -> Tensors:
        """The same by torch, to be differentiated again."""

        def pull(slope: Tensor, *inputs: Tensor) -> Tensors:
            found: Tensors = vjp(self.plain, *inputs)[1](slope)
            return found

        bent: Tensors = vjp(pull, slope, *inputs)[1](a)
        return bent


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
        return layer.value(*(tensor.detach() for tensor in inputs))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, *ctx.layer.pull(slope)
        inputs = (tensor.detach() if _straight.get() else tensor for tensor in ctx.saved_tensors)
        return None, *_Pulled.apply(ctx.layer, slope, *inputs)  # type: ignore[no-untyped-call]


class _Pulled(Function):
    """The transposed derivative of f at x, applied to a slope."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, slope: Tensor, *inputs: Tensor) -> Tensors:
        ctx.layer, ctx.bend, pulled = layer, None, layer.pull(slope)
        ctx.save_for_backward(slope, *inputs, *pulled)
        return pulled

    @staticmethod
    def backward(ctx: Any, *a: Tensor) -> tuple[Tensor | None, ...]:
        slope, *saved = ctx.saved_tensors
        inputs, pulled = tuple(saved[: len(a)]), tuple(saved[len(a) :])
        if torch.is_grad_enabled():
            return None, *ctx.layer.bend_plainly(a, slope, inputs)
        if ctx.bend is None:  # detached: what is kept must not lead back to here
            ctx.bend = ctx.layer.bend(slope.detach(), tuple(tensor.detach() for tensor in pulled))
        bent = ctx.bend(a)
        if not any(ctx.needs_input_grad[2:]):
            return None, next(bent), *(None for _ in inputs)
        return None, *bent
