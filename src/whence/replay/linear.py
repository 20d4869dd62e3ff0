r"""Linear layers, whose second derivative is products of matrices alone.

:math:`Y = XW^\top + b` is pulled back by :math:`\bar X = \bar Y W`, :math:`\bar W = \bar Y^\top X` and the sum of
:math:`\bar Y` over its rows.
"""

from typing import Any, final

from torch import Tensor
from torch.nn import functional

from whence.replay.matrices import product, shifted
from whence.replay.twice import Back, Bend, Layer, Maybe, Needs, alone, one_precision, recorded

LARGE = 2**23  # multiplications from which on this pays
NAMES = ("input", "weight", "bias")


@final
class Linear(Layer):
    """`linear`, with or without a bias."""

    def plain(self, *inputs: Tensor) -> Tensor:
        """As torch has it."""
        return functional.linear(*inputs)

    def value(self, *inputs: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        x, self._weight, *_ = inputs
        self._x, self._shape = _rows(x), x.shape
        return functional.linear(*inputs)

    def pull(self, slope: Tensor, needs: Needs) -> Maybe:
        """Of the layer's input, weight and bias, as far as they are asked for."""
        rows = _rows(slope)
        return (
            _product(rows, self._weight).view(self._shape) if needs[0] else None,
            _product(rows.t(), self._x) if needs[1] else None,
            *(rows.sum(0) if need else None for need in needs[2:]),
        )

    def bend(self, slope: Tensor) -> Bend:
        r"""<a, pull(slope)> is linear in the slope, in X and in W."""
        rows, shape = _rows(slope), slope.shape

        def bent(a: Maybe) -> tuple[Tensor, Back]:
            x, weight, *bias = a
            x = None if x is None else _rows(x)

            def back(further: Tensor | None, needs: Needs) -> Maybe:
                by_x, by_weight, *by_bias = self.pull(further, needs) if further is not None else (None for _ in needs)
                if weight is not None and needs[0]:
                    by_x = _plus(None if by_x is None else _rows(by_x), rows, weight).view(self._shape)
                if x is not None and needs[1]:
                    by_weight = _plus(by_weight, rows.t(), x)
                return by_x, by_weight, *by_bias

            return self._by_slope(x, weight, *bias).view(shape), back

        return bent

    def _by_slope(self, x: Tensor | None, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        found = bias
        if weight is not None:
            found = _plus(found, self._x, weight.t())
        if x is not None:
            found = _plus(found, x, self._weight.t())
        assert found is not None
        return found.expand(len(self._x), -1)


def linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A call of torch's, recorded; None where it is left to torch."""
    call = {"bias": None} | dict(zip(NAMES, args, strict=False)) | kwargs
    inputs = tuple(call[name] for name in NAMES if call[name] is not None)
    return recorded(Linear(), *inputs) if _pays(*inputs[:2]) and one_precision(inputs) else None


def addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The same, where it is a linear layer whose weight is turned, as transformers' `Conv1D` has it."""
    if kwargs or len(args) != 3 or args[0].dim() != 1 or len(args[0]) != args[2].shape[1]:
        return None
    bias, x, weight = args
    return linear((x, weight.t(), bias), {})


def _pays(x: Tensor, weight: Tensor) -> bool:
    return weight.dim() == 2 and x.numel() * len(weight) >= LARGE


def _product(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b) if alone() else a @ b


def _plus(to: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if to is None:
        return _product(a, b)
    if not alone():
        return a @ b + to
    return shifted(to, a, b) if to.dim() == 1 else product(a, b).add_(to)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
