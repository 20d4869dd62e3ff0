r"""Softmax and its logarithm, whose second derivative takes few passes over the probabilities.

With :math:`\sigma(X) = P \circ (X - \mathrm{rowsum}(P \circ X))`, the derivative of a softmax, which is symmetric, a
slope is pulled back to :math:`\sigma(\bar P)`, and one of the logarithm to :math:`\bar L - P\,\mathrm{rowsum}(\bar L)`.
"""

from functools import cache
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from whence.replay.twice import Back, Bend, Layer, Needs, Tensors, large, one_precision, onto, recorded

CROSS_ENTROPY: dict[str, Any] = {  # in the order of its arguments
    "input": None,
    "target": None,
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}
SIGMA = torch.ops.aten._softmax_backward_data.default


@final
class Softmax(Layer):
    """`softmax` along an axis."""

    def __init__(self, axis: int) -> None:
        self._axis = axis

    def plain(self, *inputs: Tensor) -> Tensor:
        """As torch has it."""
        return inputs[0].softmax(self._axis)

    def value(self, *inputs: Tensor) -> Tensor:
        """The probabilities."""
        self._weights = inputs[0].softmax(self._axis)
        return self._weights.clone()  # what is returned will lead back to here, and would never be freed

    def pull(self, slope: Tensor, needs: Needs) -> Tensors:
        """Of the layer's input."""
        del needs
        return (sigma(slope, self._weights, self._axis),)

    def bend(self, slope: Tensor) -> Bend:
        """As a softmax is bent at a slope."""

        @cache
        def kept() -> Tensor:
            return centred(slope, self._weights, self._axis)

        def bent(a: Tensors) -> tuple[Tensor, Back]:
            turned = sigma(a[0], self._weights, self._axis)

            def back(further: Tensor | None, needs: Needs) -> Tensors:
                del needs
                products = turned * kept()
                if further is not None:
                    products = onto(products, self._weights, further)
                return (balanced(products, self._weights, self._axis),)

            return turned, back

        return bent


@final
class LogSoftmax(Layer):
    """`log_softmax` along an axis."""

    def __init__(self, axis: int) -> None:
        self._axis = axis

    def plain(self, *inputs: Tensor) -> Tensor:
        """As torch has it."""
        return inputs[0].log_softmax(self._axis)

    def value(self, *inputs: Tensor) -> Tensor:
        """The logarithms of the probabilities."""
        value = inputs[0].log_softmax(self._axis)
        self._weights = value.exp()
        return value

    def pull(self, slope: Tensor, needs: Needs) -> Tensors:
        """Of the layer's input."""
        del needs
        return (torch.addcmul(slope, self._weights, slope.sum(self._axis, keepdim=True), value=-1),)

    def bend(self, slope: Tensor) -> Bend:
        """What bends are the probabilities, as often as the slope adds up to."""

        @cache
        def total() -> Tensor:
            return -slope.sum(self._axis, keepdim=True)

        def bent(a: Tensors) -> tuple[Tensor, Back]:
            def back(further: Tensor | None, needs: Needs) -> Tensors:
                del needs
                found = sigma(a[0] * total(), self._weights, self._axis)
                if further is None:
                    return (found,)
                return (onto(found + further, self._weights, further.sum(self._axis, keepdim=True), value=-1),)

            return centred(a[0], self._weights, self._axis), back

        return bent


def sigma(cotangent: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The derivative of a softmax, with the probabilities that it found."""
    found: Tensor = SIGMA(cotangent, weights, axis, cotangent.dtype)
    return found


def centred(cotangent: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Less its mean by the probabilities."""
    return cotangent - (weights * cotangent).sum(axis, keepdim=True)


def balanced(products: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Sigma of a cotangent that was multiplied by the probabilities already, in its memory."""
    return onto(products, weights, products.sum(axis, keepdim=True), value=-1)


def softmax(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A call of torch's, recorded; None where it is left to torch."""
    return _recorded(Softmax, args, kwargs)


def log_softmax(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A call of torch's, recorded; None where it is left to torch."""
    return _recorded(LogSoftmax, args, kwargs)


def cross_entropy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A call of torch's, with its `log_softmax` recorded; None where it is left to torch."""
    call = CROSS_ENTROPY | dict(zip(CROSS_ENTROPY, args, strict=False)) | kwargs
    logits, target = call["input"], call["target"]
    if target.is_floating_point() or any(call[name] for name in ("size_average", "reduce", "label_smoothing")):
        return None
    found = log_softmax((logits, min(1, logits.dim() - 1)), {})
    given = {name: call[name] for name in ("weight", "ignore_index", "reduction")}
    return None if found is None else nll_loss(found, target, **given)


def _recorded(kind: type[Softmax | LogSoftmax], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    call = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    x, axis = call["input"], call.get("dim")
    dtype = next((given for given in (kwargs.get("dtype"), *args[2:]) if isinstance(given, torch.dtype)), x.dtype)
    if not isinstance(axis, int) or dtype is not x.dtype or not large(x.numel()) or not one_precision((x,)):
        return None
    return recorded(kind(axis), x)
