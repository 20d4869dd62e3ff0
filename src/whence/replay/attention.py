r"""Attention whose second derivative takes few passes over its weights.

With :math:`P = \mathrm{softmax}(s\,QK^\top + M)` and :math:`Y = PV`, and :math:`\sigma` the derivative of a softmax by
its rows, :math:`\sigma(X) = P \circ (X - \mathrm{rowsum}(P \circ X))`, a slope of Y is pulled back by

.. math:: \bar V = P^\top \bar Y \qquad \bar S = \sigma(\bar Y V^\top) \qquad \bar Q = s \bar S K
   \qquad \bar K = s \bar S^\top Q.
"""

from functools import cache
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from whence.replay.softmax import balanced, centred, sigma
from whence.replay.twice import Back, Bend, Layer, Needs, Tensors, alone, large, one_precision, onto, recorded

SOFTMAX = torch.ops.aten._safe_softmax.default  # zero where a mask leaves nothing
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}


@final
class Attention(Layer):
    """`scaled_dot_product_attention` of equally many heads, without dropout.

    Args:
        mask: as torch takes it; no derivative goes through it.
        is_causal: whether later keys are hidden.
        scale: s; by default the root of the width, inverted.
    """

    def __init__(self, mask: Tensor | None = None, *, is_causal: bool = False, scale: float | None = None) -> None:
        self._mask, self._causal, self._scale = mask, is_causal, scale

    def plain(self, *inputs: Tensor) -> Tensor:
        """As torch has it."""
        q, k, v = inputs
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, self._mask, is_causal=self._causal, scale=self._scale)

    def value(self, *inputs: Tensor) -> Tensor:
        """The mixed values `[..., query, width]`."""
        q, k, v = inputs
        self._shapes = tuple(tensor.shape for tensor in inputs)
        self._s = q.shape[-1] ** -0.5 if self._scale is None else self._scale
        self._q, self._k, self._v = _flat(q * self._s), _flat(k * self._s), _flat(v)
        scores = self._hidden(torch.bmm(_flat(q), self._k.mT).view(*q.shape[:-1], k.shape[-2]))
        self._weights = _flat(SOFTMAX(scores, -1))
        return torch.bmm(self._weights, self._v).view(*q.shape[:-1], v.shape[-1])

    def pull(self, slope: Tensor, needs: Needs) -> Tensors:
        """Of queries, keys and values."""
        del needs
        slope = _flat(slope)
        by_scores = self._sigma(torch.bmm(slope, self._v.mT))
        found = torch.bmm(by_scores, self._k), torch.bmm(by_scores.mT, self._q), torch.bmm(self._weights.mT, slope)
        return self._shaped(found)

    def bend(self, slope: Tensor) -> Bend:
        r"""With :math:`A = s(a_Q K^\top + Q a_K^\top)`, the cotangent of :math:`\bar S`."""
        weights, slope, shape = self._weights, _flat(slope), slope.shape

        @cache
        def kept() -> Tensors:
            by_weights = torch.bmm(slope, self._v.mT)
            by_scores = self._sigma(by_weights)
            return centred(by_weights, weights, -1), self._s * by_scores

        def bent(a: Tensors) -> tuple[Tensor, Back]:
            q, k, v = (_flat(tensor) for tensor in a)
            turned = self._sigma(_plus(torch.bmm(q, self._k.mT), self._q, k.mT))

            def back(further: Tensor | None, needs: Needs) -> Tensors:
                del needs
                by_weights, by_scores = kept()
                met, by_v = torch.bmm(slope, v.mT), torch.bmm(turned.mT, slope)
                if further is not None:
                    further = _flat(further)
                    met, by_v = _plus(met, further, self._v.mT), _plus(by_v, weights.mT, further)
                # The weights times their own cotangent, up to what sigma takes from every row.
                scores = balanced(onto(turned * by_weights, weights, met), weights, -1)
                by_q, by_k = torch.bmm(scores, self._k), torch.bmm(scores.mT, self._q)
                return self._shaped((_plus(by_q, by_scores, k), _plus(by_k, by_scores.mT, q), by_v))

            return _plus(torch.bmm(weights, v), turned, self._v).view(shape), back

        return bent

    def _hidden(self, scores: Tensor) -> Tensor:
        if self._causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            return scores.masked_fill(~seen, -torch.inf)
        if self._mask is None:
            return scores
        return scores.masked_fill(~self._mask, -torch.inf) if self._mask.dtype is torch.bool else scores + self._mask

    def _sigma(self, cotangent: Tensor) -> Tensor:
        return sigma(cotangent, self._weights, -1)

    def _shaped(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.view(shape) for tensor, shape in zip(tensors, self._shapes, strict=True))


def attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A call of `scaled_dot_product_attention`, recorded; None where it is left to torch."""
    call = DEFAULTS | dict(zip(NAMES, args, strict=False)) | kwargs
    inputs, mask = tuple(call[name] for name in NAMES[:3]), call["attn_mask"]
    alike = one_precision(inputs) and len({tensor.shape[:-2] for tensor in inputs}) == 1
    fixed = mask is None or not (mask.requires_grad or call["is_causal"])  # torch refuses both kinds of mask at once
    if not (alike and fixed and call["dropout_p"] == 0 and large(inputs[0].shape[:-1].numel() * inputs[1].shape[-2])):
        return None
    return recorded(Attention(mask, is_causal=call["is_causal"], scale=call["scale"]), *inputs)


def _plus(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a product in place, where `vmap` does not stand in the way."""
    return to.baddbmm_(a, b) if alone() else torch.baddbmm(to, a, b)


def _flat(tensor: Tensor) -> Tensor:
    """[..., row, column] to [batch, row, column]."""
    return tensor.reshape(-1, *tensor.shape[-2:])
