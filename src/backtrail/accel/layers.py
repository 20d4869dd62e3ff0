r"""Which layers a sweep differentiates in few passes over their activations, and the elementwise and normalising ones.

The derivatives of an elementwise function are taken once a step, and those of a normalisation are
put together from torch's fused kernel.
"""

from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import gelu, layer_norm, mish, silu
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from backtrail.accel.second_order import (
    Back,
    Bend,
    Layer,
    Maybe,
    Needs,
    Tensors,
    alone,
    large,
    onto,
    recorded,
    summed,
)

KERNEL = torch.ops.aten.native_layer_norm_backward


@final
class DoubleBackwardMode(TorchFunctionMode):
    """While it is entered, large smooth layers are recorded so that they can be differentiated twice in few passes."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a smooth layer; leave all else as it is."""
        kwargs = kwargs or {}
        if function in CALLS and alone() and (found := CALLS[function](args, kwargs)) is not None:
            return found
        return function(*args, **kwargs)


@final
class _Elementwise(Layer):
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

    def pull(self, slope: Tensor, needs: Needs) -> Tensors:
        del needs
        return (slope * self._first,)

    def bend(self, slope: Tensor) -> Bend:
        second = cache(lambda: slope * self._second)

        def bent(a: Tensors) -> tuple[Tensor, Back]:
            def back(slope: Tensor | None, needs: Needs) -> Tensors:
                del needs
                found = a[0] * second()
                return (found if slope is None else onto(found, slope, self._first),)

            return a[0] * self._first, back

        return bent

    @cached_property
    def _second(self) -> Tensor:
        return grad(self._slope, self._x, _ones(self._x))[0]


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(()).expand_as(like)  # which takes no memory


@final
class _Norm(Layer):
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

    def pull(self, slope: Tensor, needs: Needs) -> Tensors:
        del needs
        kept = self._x, self._shape, self._mean, self._r, self._weight, self._bias
        found: Tensors = KERNEL(slope, *kept, [True, True, True])
        return found

    def bend(self, slope: Tensor) -> Bend:
        @cache
        def kept() -> Tensors:
            scaled = slope * self._weight * self._r
            return scaled, self._mean_of(scaled * self._normal), self._r * self._normal

        def bent(a: Tensors) -> tuple[Tensor, Back]:
            projected = self._projected(a[0])

            def back(further: Tensor | None, needs: Needs) -> Maybe:
                scaled, mean, by_r = kept()
                inside = onto(a[1] * slope, a[0], mean, value=-1)
                inside = onto(inside, scaled, self._mean_of(a[0] * self._normal), value=-1)
                both = slope * projected
                by_x = onto(
                    self._projected(inside), by_r, self._mean_of(both * self._weight), value=-1
                )
                found = by_x, both.sum(tuple(range(slope.dim() - len(self._shape)))), None
                return found if further is None else summed(found, self.pull(further, needs))

            return torch.addcmul(
                torch.addcmul(a[2], a[1], self._normal), projected, self._weight
            ), back

        return bent

    @cached_property
    def _normal(self) -> Tensor:
        return (self._x - self._mean) * self._r

    def _projected(self, tensor: Tensor) -> Tensor:
        kept = self._x, self._shape, self._mean, self._r, None, None
        found: Tensor = KERNEL(tensor, *kept, [True, False, False])[0]
        return found

    def _mean_of(self, tensor: Tensor) -> Tensor:
        return tensor.mean(tuple(range(-len(self._shape), 0)), keepdim=True)


def _elementwise(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    if not args or kwargs.get("inplace") or not large(args[0].numel()):
        return None
    return recorded(_Elementwise(partial(function, **kwargs)), args[0])


def _composed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return _elementwise(kwargs["alike"] or args[0], args[1:], {})


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if kwargs["bias"] is None or not large(args[0].numel()):
        return None
    return recorded(_Norm(tuple(args[1]), kwargs["eps"]), args[0], kwargs["weight"], kwargs["bias"])


ALIKE: dict[
    str, Callable[[Tensor], Tensor] | None
] = {  # torch's own of the same formula, in few passes
    "NewGELUActivation": partial(gelu, approximate="tanh"),
    "AccurateGELUActivation": partial(gelu, approximate="tanh"),
    "FastGELUActivation": None,
    "QuickGELUActivation": None,
}


def join(module: nn.Module) -> None:
    """Let a `TorchFunctionMode` see a composed activation of transformers as `composed`."""
    name = type(module).__name__
    if name in ALIKE and type(module).__module__.startswith("transformers."):
        module.forward = partial(composed, module.forward, alike=ALIKE[name])


def composed(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    alike: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply a function of every entry; a mode may take another one that is equal to rounding.

    >>> composed(abs, Tensor([-1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    if has_torch_function_unary(x):
        found: Tensor = handle_torch_function(composed, (x,), function, x, alike=alike)
        return found
    return function(x)


# What torch calls, and the same recorded: None where that is left to torch.
CALLS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]] = {
    layer_norm: _layer_norm,
    gelu: partial(_elementwise, gelu),
    silu: partial(_elementwise, silu),
    mish: partial(_elementwise, mish),
    composed: _composed,
}
