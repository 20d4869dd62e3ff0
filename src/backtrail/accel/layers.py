"""Elementwise layers and LayerNorm, recorded so that second derivatives take few passes.

The derivatives f' and f'' of an elementwise function are computed once per step. Those of LayerNorm
are put together from torch's fused kernel.
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
    DoubleBackward,
    InputDerivative,
    Layer,
    MaybeTensors,
    Needs,
    Tensors,
    add_product,
    is_eager,
    is_large,
    record,
    sum_cotangents,
)
from backtrail.accel.switch import enabled

# A layer and its inputs; None where a call is left to torch.
Recorded = tuple[Layer, Tensors] | None

NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward


@final
class DoubleBackwardMode(TorchFunctionMode):
    """While it is active, large smooth layers are recorded with a hand-written double backward."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a smooth layer, and leave everything else as it is."""
        kwargs = kwargs or {}
        if function in RECORDED and is_eager() and enabled():
            found = RECORDED[function](args, kwargs)
            if found is not None:
                layer, inputs = found
                return record(layer, *inputs)
        return function(*args, **kwargs)


@final
class _Elementwise(Layer):
    r"""A function of every entry: :math:`\phi = a f'(x) \bar y` summed over the entries."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def reference(self, *inputs: Tensor) -> Tensor:
        return self._function(*inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        self._x = inputs[0].requires_grad_()
        with torch.enable_grad():
            value = self._function(self._x)
            # f'(x) with its graph, from which f''(x) is computed if it is needed.
            (self._first_graph,) = grad(value, self._x, _ones_like(value), create_graph=True)
        self._first = self._first_graph.detach()
        return value.detach()

    def vjp(self, cotangent: Tensor, needs: Needs) -> Tensors:
        del needs
        return (cotangent * self._first,)

    def double_backward(self, cotangent: Tensor) -> DoubleBackward:
        # f''(x) times the cotangent, computed when the first query needs it.
        curvature = cache(lambda: cotangent * self._second)

        def derivatives(a: Tensors) -> tuple[Tensor, InputDerivative]:
            def by_input(value_cotangent: Tensor | None, needs: Needs) -> Tensors:
                del needs
                found = a[0] * curvature()
                if value_cotangent is not None:
                    found = add_product(found, value_cotangent, self._first)
                return (found,)

            return a[0] * self._first, by_input

        return derivatives

    @cached_property
    def _second(self) -> Tensor:
        return grad(self._first_graph, self._x, _ones_like(self._x))[0]


def _ones_like(tensor: Tensor) -> Tensor:
    # A single one that is expanded takes no memory.
    return tensor.new_ones(()).expand_as(tensor)


@final
class _Norm(Layer):
    r"""LayerNorm :math:`y = w n + b` with :math:`n = r (x - \mu)` and r one over the deviation.

    With u of the shape of x, :math:`P u = u - \mathrm{mean}(u) - n\, \mathrm{mean}(u n)`, the
    derivative of n by x is r P, which is symmetric. The VJP is then

    .. math:: \bar x = r P (w \bar y) \qquad \bar w = \sum \bar y\, n \qquad \bar b = \sum \bar y
    """

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        self._shape = shape
        self._eps = eps

    def reference(self, *inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        return layer_norm(x, self._shape, weight, bias, self._eps)

    def forward(self, *inputs: Tensor) -> Tensor:
        self._x, self._weight, self._bias = inputs
        value, self._mean, self._r = torch.native_layer_norm(
            self._x, self._shape, self._weight, self._bias, self._eps
        )
        return value

    def vjp(self, cotangent: Tensor, needs: Needs) -> Tensors:
        del needs
        found: Tensors = NORM_BACKWARD(
            cotangent,
            self._x,
            self._shape,
            self._mean,
            self._r,
            self._weight,
            self._bias,
            [True, True, True],
        )
        return found

    def double_backward(self, cotangent: Tensor) -> DoubleBackward:
        @cache
        def same_for_all() -> Tensors:
            scaled = cotangent * self._weight * self._r  # r u, where u = w ȳ
            return scaled, self._mean_of(scaled * self._normal), self._r * self._normal

        def derivatives(a: Tensors) -> tuple[Tensor, InputDerivative]:
            # phi = <a_x, r P(w ȳ)> + <a_w, sum ȳ n> + <a_b, sum ȳ>
            a_x, a_w, a_b = a
            projected = self._project(a_x)  # r P a_x

            def by_inputs(value_cotangent: Tensor | None, needs: Needs) -> MaybeTensors:
                scaled, scaled_mean, r_normal = same_for_all()
                # The derivative by n, which is taken on to x by another r P:
                # a_w ȳ - a_x mean(r u n) - r u mean(a_x n).
                by_normal = add_product(a_w * cotangent, a_x, scaled_mean, value=-1)
                a_mean = self._mean_of(a_x * self._normal)
                by_normal = add_product(by_normal, scaled, a_mean, value=-1)
                # The derivative by r: its own derivative by x is -r² n / size.
                by_weight = cotangent * projected
                r_mean = self._mean_of(by_weight * self._weight)
                by_x = add_product(self._project(by_normal), r_normal, r_mean, value=-1)
                row_axes = tuple(range(cotangent.dim() - len(self._shape)))
                found = by_x, by_weight.sum(row_axes), None
                if value_cotangent is None:
                    return found
                return sum_cotangents(found, self.vjp(value_cotangent, needs))

            # The derivative by ȳ: w r P a_x + a_w n + a_b.
            by_cotangent = torch.addcmul(a_b, a_w, self._normal)
            by_cotangent = torch.addcmul(by_cotangent, projected, self._weight)
            return by_cotangent, by_inputs

        return derivatives

    @cached_property
    def _normal(self) -> Tensor:
        return (self._x - self._mean) * self._r

    def _project(self, tensor: Tensor) -> Tensor:
        """Apply r P: the VJP of the normalisation without weight and bias."""
        found: Tensor = NORM_BACKWARD(
            tensor,
            self._x,
            self._shape,
            self._mean,
            self._r,
            None,
            None,
            [True, False, False],
        )[0]
        return found

    def _mean_of(self, tensor: Tensor) -> Tensor:
        normalised_axes = tuple(range(-len(self._shape), 0))
        return tensor.mean(normalised_axes, keepdim=True)


def _record_elementwise(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded:
    if not args or kwargs.get("inplace"):
        return None
    layer = _Elementwise(partial(function, **kwargs))
    return _if_worth_it(layer, (args[0],))


def _record_composed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
    function, x = args
    return _record_elementwise(kwargs["alike"] or function, (x,), {})


def _record_layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
    x, shape = args
    weight = kwargs["weight"]
    bias = kwargs["bias"]
    if weight is None or bias is None:
        return None
    return _if_worth_it(_Norm(tuple(shape), kwargs["eps"]), (x, weight, bias))


def _if_worth_it(layer: Layer, inputs: Tensors) -> Recorded:
    if is_large(inputs[0].numel()) and _has_one_precision(inputs):
        return layer, inputs
    return None


def _has_one_precision(inputs: Tensors) -> bool:
    """Whether a layer computes in the precision of its inputs, and these are plain tensors."""
    first = inputs[0]
    if torch.is_autocast_enabled(first.device.type):
        return False
    if first.dtype not in {torch.float32, torch.float64}:
        return False
    return all(tensor.dtype is first.dtype and not tensor.is_nested for tensor in inputs)


# Activations of transformers that are composed of several functions, and torch's function of the
# same formula (equal to rounding) where there is one, which takes fewer passes.
COMPOSED: dict[str, Callable[[Tensor], Tensor] | None] = {
    "NewGELUActivation": partial(gelu, approximate="tanh"),
    "AccurateGELUActivation": partial(gelu, approximate="tanh"),
    "FastGELUActivation": None,
    "QuickGELUActivation": None,
}


def mark_activation(module: nn.Module) -> None:
    """Let `DoubleBackwardMode` see a composed activation of transformers as one call.

    Outside such a mode the module computes what it did, by its own code.
    """
    name = type(module).__name__
    if name in COMPOSED and type(module).__module__.startswith("transformers."):
        module.forward = partial(composed, module.forward, alike=COMPOSED[name])


def composed(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    alike: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply a function to every entry; a mode may take another that is equal to rounding.

    >>> composed(abs, Tensor([-1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    if has_torch_function_unary(x):
        found: Tensor = handle_torch_function(composed, (x,), function, x, alike=alike)
        return found
    return function(x)


# Functions that are recorded, and how. A call may still be left to torch: a small layer, one in
# place, or one under autocast.
RECORDED: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], Recorded]] = {
    layer_norm: _record_layer_norm,
    gelu: partial(_record_elementwise, gelu),
    silu: partial(_record_elementwise, silu),
    mish: partial(_record_elementwise, mish),
    composed: _record_composed,
}
