r"""Layers with a hand-written double backward.

A layer y = f(x) has the vector-Jacobian product (VJP) :math:`\bar x = f'(x)^\top \bar y`. A sweep
differentiates it once more for every query. With a the cotangent of :math:`\bar x`, the scalar
:math:`\phi(\bar y, x) = \langle a, f'(x)^\top \bar y \rangle` has the derivatives

.. math:: \partial_{\bar y} \phi = f'(x)\, a \qquad \partial_x \phi

torch computes both from scratch for every query, in a dozen passes over the activations for GELU
and in thirty for LayerNorm. A `Layer` computes what is the same for every query once per step.
Third derivatives, which only a model that differentiates itself needs, are left to torch.
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vjp

Tensors = tuple[Tensor, ...]
MaybeTensors = tuple[Tensor | None, ...]  # cotangents, None for zero
Needs = tuple[bool, ...]  # which inputs need a cotangent
# From the cotangent of the value itself (None for zero) to the cotangents of the inputs: the
# derivative of phi by x, plus the VJP of that cotangent.
InputDerivative = Callable[[Tensor | None, Needs], MaybeTensors]
# From a to the derivative of phi by the cotangent, and its derivative by the inputs for later.
DoubleBackward = Callable[[Any], tuple[Tensor, InputDerivative]]

# Entries from which on a pass over a tensor costs more than a call of a Python function.
MIN_ENTRIES = 2**15
_cotangents_only: ContextVar[bool] = ContextVar("cotangents_only", default=False)


@contextmanager
def cotangents_only() -> Iterator[None]:
    """Record gradients that the block computes as functions of their cotangents alone.

    To the graph of such a gradient, the inputs of the layers are constants. It belongs around the
    backward pass: gradients that the model itself computes in its forward pass depend on its
    parameters.
    """
    before = _cotangents_only.set(True)
    try:
        yield
    finally:
        _cotangents_only.reset(before)


class Layer(abc.ABC):
    """A function f at one point x, with its VJP and the derivatives of that."""

    @abc.abstractmethod
    def reference(self, *inputs: Tensor) -> Tensor:
        """Evaluate f by torch's own operations, which torch can differentiate."""

    @abc.abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """Evaluate f, and keep the point x = `inputs` for the methods below."""

    @abc.abstractmethod
    def vjp(self, cotangent: Tensor, needs: Needs) -> MaybeTensors:
        """Map a cotangent of the value to those of the inputs; None where it is not needed."""

    @abc.abstractmethod
    def double_backward(self, cotangent: Tensor) -> DoubleBackward:
        r"""Map a cotangent a of `vjp(cotangent)` to the derivatives of :math:`\phi`.

        Returns the derivative by `cotangent`, and a function that computes the one by the inputs
        once the value's own cotangent is known: both together take fewer passes than each alone.
        What does not depend on a is computed once.
        """

    def double_backward_by_torch(
        self, a: MaybeTensors, cotangent: Tensor, inputs: Tensors
    ) -> Tensors:
        r"""Differentiate :math:`\phi` by cotangent and inputs such that torch can do it again."""
        given = tuple(tensor for tensor in a if tensor is not None)

        def used_cotangents(cotangent: Tensor, *inputs: Tensor) -> Tensors:
            pull = vjp(self.reference, *inputs)[1]
            found: Tensors = pull(cotangent)
            return tuple(x for x, used in zip(found, a, strict=True) if used is not None)

        pull = vjp(used_cotangents, cotangent, *inputs)[1]
        derivatives: Tensors = pull(given)
        return derivatives


def is_eager() -> bool:
    """Whether neither a transform of torch.func nor a compiler is active."""
    in_transform = torch._C._functorch.maybe_current_level() is not None
    return not in_transform and not torch.compiler.is_compiling()


def is_large(entries: int) -> bool:
    """Whether a layer of so many entries is worth its calls of Python functions."""
    return entries >= MIN_ENTRIES


def add_product(target: Tensor, a: Tensor, b: Tensor, *, value: int = 1) -> Tensor:
    """Add `value` times a product to a tensor that nobody else holds.

    In place, except under `vmap`, where the target may lack the axis of the factors.
    """
    if is_eager():
        return target.addcmul_(a, b, value=value)
    return torch.addcmul(target, a, b, value=value)


def sum_cotangents(left: MaybeTensors, right: MaybeTensors) -> MaybeTensors:
    """Sum of cotangents of the same inputs, where None is zero."""
    total = []
    for one, other in zip(left, right, strict=True):
        if one is None or other is None:
            total.append(other if one is None else one)
        else:
            total.append(one + other)
    return tuple(total)


def record(layer: Layer, *inputs: Tensor) -> Tensor:
    """Evaluate a layer such that autograd uses its derivatives."""
    value: Tensor = _Value.apply(_Call(layer), *inputs)[0]  # type: ignore[no-untyped-call]
    return value


@final
class _Call:
    """One call of a layer, and the input derivatives that a running backward pass has pending."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._pending: list[InputDerivative] = []
        self._backward_pass = -1  # which one they belong to

    def defer(self, derivative: InputDerivative) -> None:
        """Keep a derivative by the inputs until the value's own cotangent is known."""
        current = torch._C._current_graph_task_id()
        if self._backward_pass != current:
            # Whatever is pending was left by a backward pass that failed.
            self._backward_pass = current
            self._pending = []
        self._pending.append(derivative)

    def input_cotangents(self, cotangent: Tensor | None, needs: Needs) -> MaybeTensors:
        """Cotangents of the inputs: the VJP of the value's cotangent, and all that is pending."""
        pending = self._pending
        self._pending = []
        if self._backward_pass != torch._C._current_graph_task_id():
            pending = []
        if not pending and cotangent is not None:
            return self.layer.vjp(cotangent, needs)
        total: MaybeTensors = tuple(None for _ in needs)
        for derivative in pending:
            total = sum_cotangents(total, derivative(cotangent, needs))
            cotangent = None  # the first derivative has added its VJP
        return total


class _Value(Function):
    """Evaluate f(x), and return an empty tensor besides.

    The empty tensor becomes an input of every `_VJP`. Through it autograd knows that this node
    depends on them, and runs their backward before this one's.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensors:
        ctx.call = call
        ctx.set_materialize_grads(False)
        value = call.layer.forward(*(tensor.detach() for tensor in inputs))
        order = value.new_empty(0)
        ctx.save_for_backward(order, *inputs)
        if value._is_view():
            # A view that was made in here could not be overwritten, e.g. by an in-place ReLU.
            value = torch.ops.aten._unsafe_view(value, value.shape)
        return value, order

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, _: Tensor | None) -> MaybeTensors:
        call = ctx.call
        needs = ctx.needs_input_grad[1:]
        if cotangent is None or not torch.is_grad_enabled():
            return None, *call.input_cotangents(cotangent, needs)
        order, *inputs = ctx.saved_tensors
        if _cotangents_only.get():
            order = order.detach()
            inputs = [tensor.detach() for tensor in inputs]
        return None, *_VJP.apply(call, needs, cotangent, order, *inputs)  # type: ignore[no-untyped-call]


class _VJP(Function):
    """The VJP of a layer, as a function of the cotangent and the inputs."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, needs: Needs, cotangent: Tensor, order: Tensor, *inputs: Tensor
    ) -> MaybeTensors:
        ctx.call = call
        ctx.double_backward = None
        ctx.order = order.detach()
        ctx.save_for_backward(cotangent, *inputs)
        return call.layer.vjp(cotangent, needs)

    @staticmethod
    def backward(ctx: Any, *a: Tensor | None) -> MaybeTensors:
        cotangent, *inputs = ctx.saved_tensors
        call = ctx.call
        if torch.is_grad_enabled():
            derivatives = call.layer.double_backward_by_torch(a, cotangent, tuple(inputs))
            by_cotangent, *by_inputs = derivatives
            return None, None, by_cotangent, None, *by_inputs
        if ctx.double_backward is None:
            # Kept for further queries: it holds what is the same for all of them.
            ctx.double_backward = call.layer.double_backward(cotangent.detach())
        by_cotangent, input_derivative = ctx.double_backward(a)
        if ctx.needs_input_grad[3]:
            call.defer(input_derivative)
        # The cotangents of the inputs come from `_Value.backward`, which adds all that is pending.
        return None, None, by_cotangent, ctx.order, *(None for _ in inputs)
