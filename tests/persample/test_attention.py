"""Attention written out is torch's own, to the last bit, and its projections are traced."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from backtrail.persample.attention import attend, is_written_out
from backtrail.persample.trace import OpTracer

TOKENS, SLOTS, WIDTH, HEADS = 5, 3, 8, 2


class Call(TorchFunctionMode):
    """Keeps the arguments of the attention that a module calls."""

    arguments: dict[str, Any]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an attention; run everything."""
        del types
        if func is multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.arguments = dict(bound.arguments)
        return func(*args, **(kwargs or {}))


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Random inputs, tokens first."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def itself() -> list[Tensor]:
    """Queries that are keys and values."""
    return tensors((TOKENS, SLOTS, WIDTH)) * 3


def other() -> list[Tensor]:
    """Keys that are values, of other tokens."""
    query, key = tensors((TOKENS, SLOTS, WIDTH), (4, SLOTS, WIDTH))
    return [query, key, key]


def three() -> list[Tensor]:
    """All different."""
    return tensors((TOKENS, SLOTS, WIDTH), (4, SLOTS, WIDTH), (4, SLOTS, WIDTH))


def wide() -> list[Tensor]:
    """Keys and values of other widths, which have projections of their own."""
    return tensors((TOKENS, SLOTS, WIDTH), (4, SLOTS, 3), (4, SLOTS, 6))


INPUTS = {"itself": itself, "other": other, "three": three, "wide": wide}
SIZES = {"wide": {"kdim": 3, "vdim": 6}}
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
PADDING = torch.tensor([[False] * 4 + [True], [False] * 5, [False] * 3 + [True] * 2])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights by head": {"average_attn_weights": False},
}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal, with weights": {"attn_mask": CAUSAL, "is_causal": True},
    "a mask": {"attn_mask": CAUSAL.isinf(), "need_weights": False},
    "a mask by slot and head": {
        "attn_mask": CAUSAL.expand(SLOTS * HEADS, -1, -1),
        "need_weights": False,
    },
    "padding": {"key_padding_mask": PADDING},
    "padding, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "both": {
        "key_padding_mask": PADDING,
        "attn_mask": CAUSAL.isinf(),
        "is_causal": True,
        "need_weights": False,
    },
}
CASES = [(name, option) for name in INPUTS for option in OPTIONS] + [
    ("itself", option) for option in MASKS
]


def outcome(found: tuple[Tensor, Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, weights and all gradients."""
    outputs, weights = found
    loss = outputs.sin().sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [outputs, *([] if weights is None else [weights]), *gradients]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("inputs", "options"), CASES)
def test_it_is_torch_own_to_the_last_bit(
    inputs: str, options: str, dropout: float, *, bias: bool
) -> None:
    """Outputs, weights and gradients, with the same dropout."""
    torch.manual_seed(0)
    core = nn.MultiheadAttention(WIDTH, HEADS, dropout, bias=bias, **SIZES.get(inputs, {}))
    given = INPUTS[inputs]()
    leaves = [*dict.fromkeys(given), *core.parameters()]
    noted = Call()
    torch.manual_seed(1)
    with noted:
        expected = outcome(core(*given, **(OPTIONS | MASKS)[options]), leaves)
    assert is_written_out(noted.arguments)
    torch.manual_seed(1)
    found = outcome(attend(noted.arguments), leaves)
    for one, wanted in zip(found, expected, strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_left_to_torch(options: dict[str, bool]) -> None:
    """Their projections are not seen; the parameters are differentiated sample by sample."""
    core = nn.MultiheadAttention(WIDTH, HEADS, **options)
    given = itself()
    tracer = OpTracer(dict(core.named_parameters()), SLOTS, given)
    with tracer:
        found, _ = core(*given)
    assert torch.equal(found, core(*given)[0])
    assert tracer.uses == []


def test_a_single_sequence_is_left_to_torch() -> None:
    """It has no slots."""
    noted = Call()
    with noted:
        nn.MultiheadAttention(WIDTH, HEADS)(*[tensor[:, 0] for tensor in three()])
    assert not is_written_out(noted.arguments)


@pytest.mark.parametrize("slots", [SLOTS, TOKENS], ids=["slots", "as many slots as tokens"])
def test_the_projections_are_traced(slots: int) -> None:
    """With the tokens first, also where that could be read either way."""
    core = nn.MultiheadAttention(WIDTH, HEADS)
    (x,) = tensors((TOKENS, slots, WIDTH))
    tracer = OpTracer(dict(core.named_parameters()), slots, x)
    with tracer:
        core(x, x, x, need_weights=False)
    layouts = {use.name: use.layout for use in tracer.uses}
    assert layouts == {
        "in_proj_weight": "second",
        "in_proj_bias": "second",
        "out_proj.weight": "flat, tokens first",
        "out_proj.bias": "flat, tokens first",
    }
