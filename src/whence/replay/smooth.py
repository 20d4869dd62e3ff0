r"""Smooth layers whose second derivative takes few passes over their activations.

A layer y = f(x) is pulled back by :math:`\bar x = f'(x)^\top \bar y`, and a sweep differentiates that again for every
query. torch does so from scratch, in a dozen passes for GELU and in thirty for LayerNorm. Here the derivatives of an
elementwise function are taken once a step, and those of a normalisation are put together from torch's fused kernel.
Third derivatives, which only a model that differentiates itself asks for, are left to torch.
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function, grad
from torch.func import vjp
from torch.nn.functional import gelu, layer_norm, mish, silu
from torch.overrides import TorchFunctionMode

from whence.activations import composed

Tensors = tuple[Tensor, ...]

ELEMENTWISE = frozenset({gelu, silu, mish})
LARGE = 2**15  # entries from which on a pass over them costs more than a call from Python
KERNEL = torch.ops.aten.native_layer_norm_backward
_straight: ContextVar[bool] = ContextVar("straight", default=False)


@final
class Smooth(TorchFunctionMode):
    """While it is entered, large smooth layers are recorded so that they can be differentiated twice in few passes."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a smooth layer; leave all else as it is."""
        kwargs = kwargs or {}
        if function is composed and _pays(args[1:]):
            return _recorded(_Elementwise(args[0]), args[1])
        if function in ELEMENTWISE and not kwargs.get("inplace") and _pays(args):
            return _recorded(_Elementwise(partial(function, **kwargs)), args[0])
        if function is layer_norm and kwargs["bias"] is not None and _pays(args):
            return _recorded(_Norm(tuple(args[1]), kwargs["eps"]), args[0], kwargs["weight"], kwargs["bias"])
        return function(*args, **kwargs)


def _pays(args: tuple[Any, ...]) -> bool:
    # Under a transform of the model's own, layers are left alone; a compiler puts passes together by itself.
    alone = torch._C._functorch.maybe_current_level() is None and not torch.compiler.is_compiling()
    return alone and bool(args) and args[0].numel() >= LARGE


@contextmanager
def straight() -> Iterator[None]:
    """While it is entered, what is pulled back is recorded as a function of its cotangents alone, not of the layers."""
    before = _straight.set(True)
    try:
        yield
    finally:
        _straight.reset(before)


class _Layer(abc.ABC):
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
    def bend(self, a: Tensors, slope: Tensor, pulled: Tensors) -> Iterator[Tensor]:
        """The derivatives of <a, pull(slope)>: by the slope, and then, if they are asked for, by the inputs."""

    def bend_plainly(self, a: Tensors, slope: Tensor, inputs: Tensors) -> Tensors:
        """The same by torch, to be differentiated again."""

        def pull(slope: Tensor, *inputs: Tensor) -> Tensors:
            found: Tensors = vjp(self.plain, *inputs)[1](slope)
            return found

        bent: Tensors = vjp(pull, slope, *inputs)[1](a)
        return bent


@final
class _Elementwise(_Layer):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def plain(self, *inputs: Tensor) -> Tensor:
        return self._function(*inputs)

    def value(self, *inputs: Tensor) -> Tensor:
        self._x = inputs[0].requires_grad_()
        with torch.enable_grad():
            value = self._function(self._x)
            (self._slope,) = grad(value, self._x, _ones(value), create_graph=True)
        self._first = self._slope.detach()
        return value.detach()

    def pull(self, slope: Tensor) -> Tensors:
        return (slope * self._first,)

    def bend(self, a: Tensors, slope: Tensor, pulled: Tensors) -> Iterator[Tensor]:
        del pulled
        yield a[0] * self._first
        yield (a[0] * slope).mul_(self._second)

    @cached_property
    def _second(self) -> Tensor:
        return grad(self._slope, self._x, _ones(self._x))[0]


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(()).expand_as(like)  # which takes no memory


@final
class _Norm(_Layer):
    """LayerNorm. With r = 1 / deviation, the derivative of the normalised value by x is r times a projection."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        self._shape, self._eps = shape, eps

    def plain(self, *inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        return layer_norm(x, self._shape, weight, bias, self._eps)

    def value(self, *inputs: Tensor) -> Tensor:
        self._x, self._weight, self._bias = inputs
        point = self._x, self._shape, self._weight, self._bias, self._eps
        value, self._mean, self._r = torch.native_layer_norm(*point)
        return value

    def pull(self, slope: Tensor) -> Tensors:
        kept = self._x, self._shape, self._mean, self._r, self._weight, self._bias
        found: Tensors = KERNEL(slope, *kept, [True, True, True])
        return found

    def bend(self, a: Tensors, slope: Tensor, pulled: Tensors) -> Iterator[Tensor]:
        projected = self._projected(a[0])
        yield torch.addcmul(torch.addcmul(a[2], a[1], self._normal), projected, self._weight)
        scaled = slope * self._weight
        inside = a[0] * self._mean_of(scaled * self._normal) + scaled * self._mean_of(a[0] * self._normal)
        by_r = self._r * self._normal * self._mean_of(a[0] * pulled[0])
        yield self._projected(a[1] * slope - self._r * inside) - by_r
        yield (slope * projected).sum(tuple(range(slope.dim() - len(self._shape))))
        yield torch.zeros_like(self._bias)

    @cached_property
    def _normal(self) -> Tensor:
        return (self._x - self._mean) * self._r

    def _projected(self, tensor: Tensor) -> Tensor:
        kept = self._x, self._shape, self._mean, self._r, None, None
        found: Tensor = KERNEL(tensor, *kept, [True, False, False])[0]
        return found

    def _mean_of(self, tensor: Tensor) -> Tensor:
        return tensor.mean(tuple(range(-len(self._shape), 0)), keepdim=True)


def _recorded(layer: _Layer, *inputs: Tensor) -> Tensor:
    value: Tensor = _Value.apply(layer, *inputs)  # type: ignore[no-untyped-call]
    return value


class _Value(Function):
    """f(x)."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, *inputs: Tensor) -> Tensor:
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
    def forward(ctx: Any, layer: _Layer, slope: Tensor, *inputs: Tensor) -> Tensors:
        ctx.layer, pulled = layer, layer.pull(slope)
        ctx.save_for_backward(slope, *inputs, *pulled)
        return pulled

    @staticmethod
    def backward(ctx: Any, *a: Tensor) -> tuple[Tensor | None, ...]:
        slope, *saved = ctx.saved_tensors
        inputs, pulled = tuple(saved[: len(a)]), tuple(saved[len(a) :])
        if torch.is_grad_enabled():
            return None, *ctx.layer.bend_plainly(a, slope, inputs)
        bent = ctx.layer.bend(a, slope, pulled)
        if not any(ctx.needs_input_grad[2:]):
            return None, next(bent), *(None for _ in inputs)
        return None, *bent
