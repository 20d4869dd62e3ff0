r"""Multi-head attention of torch.nn, written out in operations that a tracer sees.

A function mode is handed `torch.nn.functional.multi_head_attention_forward` as one operation, and
is not active while torch computes it: the projections inside, which use the parameters, are hidden.
So the tracer computes attention by this module instead, with itself active. These are torch's own
steps in torch's own order, so the numbers are the same to the last bit. Calls with options that
change what the projections are used for are left to torch (`is_written_out`); their parameters are
then differentiated sample by sample.

Shapes: L tokens of the queries, S tokens of keys and values, N slots, E features, H heads of D
features each.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear, scaled_dot_product_attention, softmax

Call = Mapping[str, Any]  # arguments of `multi_head_attention_forward`, by name
LEFT_TO_TORCH = ("bias_k", "bias_v", "static_k", "static_v")


def is_written_out(call: Call) -> bool:
    """Whether `attend` computes this call: a batch, without extra keys and values."""
    has_extra_keys = call["add_zero_attn"] or any(call[name] is not None for name in LEFT_TO_TORCH)
    return call["query"].dim() == 3 and not has_extra_keys


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention; return outputs `[L, N, E]`, and weights `[N, L, S]` if they are needed."""
    q, k, v = _project(call)  # [L or S, N, E]
    mask, is_causal = _merged_mask(call)
    heads = call["num_heads"]
    q = _split_heads(q, heads)  # [N H, L or S, D]
    k = _split_heads(k, heads)
    v = _split_heads(v, heads)
    probability = call["dropout_p"] if call["training"] else 0.0
    if call["need_weights"]:
        return _attend_with_weights(call, q, k, v, mask, probability)
    return _attend_fused(call, q, k, v, mask, probability, is_causal=is_causal), None


def _project(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the input projections to queries, keys and values."""
    query = call["query"]
    key = call["key"]
    value = call["value"]
    bias = call["in_proj_bias"]
    if call["use_separate_proj_weight"]:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q = linear(query, call["q_proj_weight"], biases[0])
        k = linear(key, call["k_proj_weight"], biases[1])
        v = linear(value, call["v_proj_weight"], biases[2])
        return q, k, v
    weight = call["in_proj_weight"]
    width = query.shape[-1]
    if key is value and query is key:
        # Self-attention: one product, whose weight is the parameter itself.
        q, k, v = _unpack(linear(query, weight, bias), 3)
        return q, k, v
    if key is value:
        q_weight, kv_weight = weight.split([width, 2 * width])
        q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
        q = linear(query, q_weight, q_bias)
        k, v = _unpack(linear(key, kv_weight, kv_bias), 2)
        return q, k, v
    q_weight, k_weight, v_weight = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q = linear(query, q_weight, biases[0])
    k = linear(key, k_weight, biases[1])
    v = linear(value, v_weight, biases[2])
    return q, k, v


def _unpack(projected: Tensor, count: int) -> Tensor:
    """`[L, N, count E]` -> `[count, L, N, E]`."""
    apart = projected.unflatten(-1, (count, -1))  # type: ignore[no-untyped-call]
    found: Tensor = apart.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return found


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """`[L, N, E]` -> `[N H, L, D]`."""
    tokens, slots, width = x.shape
    return x.view(tokens, slots * heads, width // heads).transpose(0, 1)


def _merged_mask(call: Call) -> tuple[Tensor | None, bool]:
    """What is added to the scores, `[1 or N H, 1 or L, S]`, and whether torch adds a causal mask.

    `is_causal` promises that `attn_mask` is a causal mask, so that torch may use its own. That is
    only possible where nothing else is masked and the weights are not needed.
    """
    is_causal = call["is_causal"]
    attn_mask = call["attn_mask"]
    padding_mask = call["key_padding_mask"]
    dtype = call["query"].dtype
    if is_causal and padding_mask is None and not call["need_weights"]:
        return None, True
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, dtype)
        if attn_mask.dim() == 2:
            attn_mask = attn_mask.unsqueeze(0)
    if padding_mask is None:
        return attn_mask, is_causal
    slots, tokens = padding_mask.shape
    heads = call["num_heads"]
    padding_mask = _additive(padding_mask, dtype).view(slots, 1, 1, tokens)
    padding_mask = padding_mask.expand(-1, heads, -1, -1).reshape(slots * heads, 1, tokens)
    return padding_mask if attn_mask is None else attn_mask + padding_mask, False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: minus infinity where a Boolean one is true."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _attend_with_weights(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, probability: float
) -> tuple[Tensor, Tensor]:
    slots = call["query"].shape[1]
    _, queries, width = q.shape
    scaled = q * math.sqrt(1.0 / float(width))
    if mask is None:
        scores = torch.bmm(scaled, k.transpose(-2, -1))
    else:
        scores = torch.baddbmm(mask, scaled, k.transpose(-2, -1))
    weights = softmax(scores, dim=-1)  # [N H, L, S]
    if probability > 0:
        weights = dropout(weights, p=probability)
    context = torch.bmm(weights, v).transpose(0, 1).reshape(queries * slots, -1)  # [L N, E]
    out = _project_out(call, context)
    weights = weights.view(slots, -1, queries, k.shape[1])
    return out, weights.mean(dim=1) if call["average_attn_weights"] else weights


def _attend_fused(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    probability: float,
    *,
    is_causal: bool,
) -> Tensor:
    slots = call["query"].shape[1]
    heads = call["num_heads"]
    if mask is not None:
        # [1, L, S] for all slots and heads, or [N H, 1 or L, S] by slot and head.
        is_shared = mask.shape[0] == 1
        mask = mask.unsqueeze(0) if is_shared else mask.view(slots, heads, -1, k.shape[1])
    q = q.view(slots, heads, *q.shape[1:])
    k = k.view(slots, heads, *k.shape[1:])
    v = v.view(slots, heads, *v.shape[1:])
    context = scaled_dot_product_attention(q, k, v, mask, probability, is_causal)  # [N, H, L, D]
    # [L N, E]: the tokens of all samples follow one another, sample by sample within a token.
    context = context.permute(2, 0, 1, 3).reshape(-1, call["query"].shape[-1])
    return _project_out(call, context)


def _project_out(call: Call, context: Tensor) -> Tensor:
    """Apply the output projection to `[L N, E]`, and bring it to `[L, N, E]`."""
    tokens, slots, _ = call["query"].shape
    out = linear(context, call["out_proj_weight"], call["out_proj_bias"])
    return out.view(tokens, slots, out.shape[-1])
