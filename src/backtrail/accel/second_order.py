r"""Layers that say themselves how they are differentiated twice.

A layer y = f(x) is pulled back by :math:`\bar x = f'(x)^\top \bar y`, and a sweep differentiates
that again for every query. torch does so from scratch, in a dozen passes for GELU and in thirty for
LayerNorm or attention. A `Layer` takes what is the same for every query once a step. Third
derivatives, which only a model that differentiates itself asks for, are left to torch.
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
Back = Callable[
    [Tensor | None, Needs], Maybe
]  # from a slope, None for zero, to those of the inputs
Bend = Callable[[Any], tuple[Tensor, Back]]

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
        """From a to the derivatives of <a, pull(slope)>: by the slope; and those by the inputs, for later.

        The latter are called with the value's own cotangent and add what that is pulled back to:
        both in one go take fewer passes than each for itself. What is the same for every a is kept.
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
    full = inputs[0].dtype in {torch.float32, torch.float64} and not torch.is_autocast_enabled(
        inputs[0].device.type
    )
    return (
        full
        and len({(tensor.dtype, tensor.is_nested) for tensor in inputs}) == 1
        and not inputs[0].is_nested
    )


def onto(to: Tensor, a: Tensor, b: Tensor, *, value: int = 1) -> Tensor:
    """Add a product to a tensor that nobody else holds: in place, where `vmap` does not stand in the way."""
    return to.addcmul_(a, b, value=value) if alone() else torch.addcmul(to, a, b, value=value)


def summed(left: Maybe, right: Maybe) -> Maybe:
    """Cotangents of the same inputs, where None is zero."""
    pairs = zip(left, right, strict=True)
    return tuple(
        one if other is None else other if one is None else one + other for one, other in pairs
    )


def recorded(layer: Layer, *inputs: Tensor) -> Tensor:
    """The layer's value at these inputs, differentiated as it says."""
    value: Tensor = _Value.apply(_Call(layer), *inputs)[0]  # type: ignore[no-untyped-call]
    return value


class _Call:
    """One call of a layer, and what the backward pass under way has left for its end."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._under_way, self._left = -1, list[Back]()

    def leave(self, back: Back) -> None:
        """Keep the derivatives by the inputs for when the value's own cotangent is known."""
        if self._under_way != (now := torch._C._current_graph_task_id()):
            self._under_way, self._left = now, []  # whatever is there, a pass that failed has left
        self._left.append(back)

    def back(self, slope: Tensor | None, needs: Needs) -> Maybe:
        """From the value's own cotangent, together with what was left."""
        left, self._left = self._left, []
        if self._under_way != torch._C._current_graph_task_id():
            left = []
        if slope is not None and not left:
            return self.layer.pull(slope, needs)
        found: Maybe = tuple(None for _ in needs)
        for back in left:
            found, slope = summed(found, back(slope, needs)), None
        return found


class _Value(Function):
    """f(x), and a thread: a tensor without entries, by which the passes below come before the last one in here."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensors:
        ctx.call = call
        ctx.set_materialize_grads(False)
        value = call.layer.value(*(tensor.detach() for tensor in inputs))
        thread = value.new_empty(0)
        ctx.save_for_backward(thread, *inputs)
        # A view that was made in here could not be overwritten, as by an activation in place.
        return torch.ops.aten._unsafe_view(
            value, value.shape
        ) if value._is_view() else value, thread

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, _: Tensor | None) -> Maybe:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        if slope is None or not torch.is_grad_enabled():
            return None, *call.back(slope, needs)
        point = (tensor.detach() if _straight.get() else tensor for tensor in ctx.saved_tensors)
        return None, *_Pulled.apply(call, needs, slope, *point)  # type: ignore[no-untyped-call]


class _Pulled(Function):
    """The transposed derivative of f at x, applied to a slope."""

    @staticmethod
    def forward(ctx: Any, call: _Call, needs: Needs, *point: Tensor) -> Maybe:
        slope, thread, *inputs = point
        ctx.call, ctx.bend, ctx.end = call, None, thread.detach()
        ctx.save_for_backward(slope, *inputs)
        return call.layer.pull(slope, needs)

    @staticmethod
    def backward(ctx: Any, *a: Tensor | None) -> Maybe:
        slope, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            by_slope, *bent = ctx.call.layer.bend_plainly(a, slope, tuple(inputs))
            return None, None, by_slope, None, *bent
        if ctx.bend is None:
            ctx.bend = ctx.call.layer.bend(slope.detach())
        by_slope, back = ctx.bend(a)
        if ctx.needs_input_grad[3]:
            ctx.call.leave(back)
        return None, None, by_slope, ctx.end, *(None for _ in inputs)
