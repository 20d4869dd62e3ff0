"""Models with one kind of layer each, and what is fed to them: `[slot, ...]`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SLOTS, WIDTH, PLACES, WORDS = 3, 4, 5, 7


class Mapped(nn.Module):
    """A function of some modules and parameters."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        nn.Module.__init__(self)
        self.call = call
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        """What the function says."""
        return self.call(self, x)


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 has it: the weight turned, tokens in one long row."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        """Product and sum."""
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], 6)


def table(words: int = WORDS, **options: Any) -> nn.Embedding:
    """Words to vectors."""
    return nn.Embedding(words, WIDTH, **options)


def tied() -> nn.Module:
    """A table that is the head, too."""
    model = nn.Sequential(table(), nn.Tanh(), nn.Linear(WIDTH, WORDS, bias=False))
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    """The first layer and the last bias do not learn."""
    model = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def sequence() -> Tensor:
    """Of vectors."""
    return torch.randn(SLOTS, PLACES, WIDTH)


def tokens() -> Tensor:
    """Of words; one comes twice."""
    return torch.cat([torch.randint(0, WORDS, (SLOTS, PLACES - 1)), torch.ones(SLOTS, 1).long()], 1)


def image() -> Tensor:
    """Four channels."""
    return torch.randn(SLOTS, WIDTH, 6, 6)


@dataclass(frozen=True)
class Layer:
    """A model, its inputs, and the parameters that only a loop over samples explains."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = sequence
    slow: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The name."""
        return self.name


def conv(**options: Any) -> Callable[[], nn.Module]:
    """Two axes."""
    return lambda: nn.Conv2d(WIDTH, 6, (3, 2), **options)


def conv1(**options: Any) -> Callable[[], nn.Module]:
    """One axis."""
    return lambda: nn.Conv1d(PLACES, 10, 3, **options)


LSTM = ("core.weight_ih_l0", "core.weight_hh_l0", "core.bias_ih_l0", "core.bias_hh_l0")
LAYERS = [
    Layer("linear", lambda: nn.Linear(WIDTH, 6), lambda: torch.randn(SLOTS, WIDTH)),
    Layer("linear on sequences", lambda: nn.Linear(WIDTH, 6)),
    Layer("linear without bias", lambda: nn.Linear(WIDTH, 6, bias=False)),
    Layer(
        "slots second",
        lambda: Mapped(
            lambda m, x: m.core(x.transpose(0, 1)).transpose(0, 1), core=nn.Linear(4, 6)
        ),
    ),
    Layer("conv1d", conv1()),
    Layer("conv1d, options", conv1(stride=2, padding=2, dilation=2)),
    Layer("conv1d, groups", conv1(groups=5, padding="same")),
    Layer("conv2d", conv(), image),
    Layer("conv2d, options", conv(stride=(2, 1), padding=(1, 2), dilation=(1, 2)), image),
    Layer("conv2d, groups", conv(groups=2), image),
    Layer("conv2d, same", lambda: nn.Conv2d(WIDTH, 6, 3, padding="same", bias=False), image),
    Layer("conv2d, reflected", conv(padding=1, padding_mode="reflect"), image),
    Layer(
        "conv3d",
        lambda: nn.Conv3d(2, 3, 2),
        lambda: torch.randn(SLOTS, 2, 3, 3, 3),
        ("weight", "bias"),
    ),
    Layer("embedding", table, tokens),
    Layer("embedding, padding", lambda: table(padding_idx=1), tokens),
    Layer("layernorm", lambda: nn.LayerNorm(WIDTH)),
    Layer("layernorm over two axes", lambda: nn.LayerNorm((PLACES, WIDTH))),
    Layer("rmsnorm", lambda: nn.RMSNorm(WIDTH)),
    Layer("groupnorm", lambda: nn.GroupNorm(2, WIDTH), image),
    Layer(
        "batchnorm",
        lambda: nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Tanh(), nn.Conv2d(4, 3, 2)),
        image,
    ),
    Layer("turned", lambda: nn.Sequential(Conv1D(), nn.Tanh(), nn.Linear(6, 2))),
    Layer("matmul", lambda: Mapped(lambda m, x: x @ m.w, w=torch.randn(WIDTH, 6))),
    Layer("tied", tied, tokens),
    Layer(
        "called twice",
        lambda: Mapped(lambda m, x: m.core(torch.tanh(m.core(x))), core=nn.Linear(4, 4)),
    ),
    Layer(
        "in place",
        lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)),
    ),
    Layer("frozen", frozen),
    Layer(
        "positions",
        lambda: Mapped(lambda m, x: torch.tanh(x + m.p[:, :PLACES]), p=torch.randn(1, 8, WIDTH)),
    ),
    Layer(
        "positions from a table",
        lambda: Mapped(
            lambda m, x: torch.tanh(m.word(x) + m.place(torch.arange(PLACES))),
            word=table(),
            place=table(),
        ),
        tokens,
    ),
    Layer(
        "gain",
        lambda: Mapped(
            lambda m, x: torch.tanh(x) * m.gain + m.shift, gain=torch.ones(4), shift=torch.ones(1)
        ),
    ),
    Layer(
        "class token",
        lambda: Mapped(
            lambda m, x: m.core(torch.cat([m.cls.expand(len(x), -1, -1), x], 1)).tanh(),
            cls=torch.randn(1, 1, WIDTH),
            core=nn.Linear(WIDTH, 3),
        ),
    ),
    Layer(
        "attention",
        lambda: Mapped(
            lambda m, x: m.core(x, x, x)[0], core=nn.MultiheadAttention(4, 2, batch_first=True)
        ),
    ),
    Layer(
        "encoder", lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True)
    ),
    Layer("dropout", lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.Dropout(0.4), nn.Linear(6, 2))),
    Layer(
        "lstm",
        lambda: Mapped(lambda m, x: m.core(x)[0], core=nn.LSTM(WIDTH, 3, batch_first=True)),
        slow=LSTM,
    ),
    Layer(
        "weight norm",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 6)),
        slow=("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ),
    Layer(
        "used without its module",
        lambda: Mapped(lambda m, x: x @ m.core.weight.mT, core=nn.Linear(4, 6)),
        slow=("core.weight",),
    ),
]


def nonlinear_loss(outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Return losses `[slot]` that depend on all outputs, linearly on none of them."""
    flat = outputs.flatten(1)
    waves = torch.sin(flat)
    factors = torch.arange(1.0, flat.shape[1] + 1).to(flat)
    return (waves * factors).sum(1) + waves.square().sum(1) * batch[1]
