"""Captured rows are the samples' gradients, projected: against a loop over samples with whole gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whence.batchnorm import tracking
from whence.methods.projection import Projection, projection
from whence.replay import capture
from whence.replay.capture import captured
from whence.replay.state import Fed, Step
from whence.replay.transition import Piece, Transition
from whence.replay.update import Update
from whence.task import Task
from whence.tree import Tree

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
        """X W + b."""
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
    Layer("slots second", lambda: Mapped(lambda m, x: m.core(x.transpose(0, 1)).transpose(0, 1), core=nn.Linear(4, 6))),
    Layer("conv1d", conv1()),
    Layer("conv1d, options", conv1(stride=2, padding=2, dilation=2)),
    Layer("conv1d, groups", conv1(groups=5, padding="same")),
    Layer("conv2d", conv(), image),
    Layer("conv2d, options", conv(stride=(2, 1), padding=(1, 2), dilation=(1, 2)), image),
    Layer("conv2d, groups", conv(groups=2), image),
    Layer("conv2d, same", lambda: nn.Conv2d(WIDTH, 6, 3, padding="same", bias=False), image),
    Layer("conv2d, reflected", conv(padding=1, padding_mode="reflect"), image),
    Layer("conv3d", lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(SLOTS, 2, 3, 3, 3), ("weight", "bias")),
    Layer("embedding", table, tokens),
    Layer("embedding, padding", lambda: table(padding_idx=1), tokens),
    Layer("layernorm", lambda: nn.LayerNorm(WIDTH)),
    Layer("layernorm over two axes", lambda: nn.LayerNorm((PLACES, WIDTH))),
    Layer("rmsnorm", lambda: nn.RMSNorm(WIDTH)),
    Layer("groupnorm", lambda: nn.GroupNorm(2, WIDTH), image),
    Layer("batchnorm", lambda: nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Tanh(), nn.Conv2d(4, 3, 2)), image),
    Layer("turned", lambda: nn.Sequential(Conv1D(), nn.Tanh(), nn.Linear(6, 2))),
    Layer("matmul", lambda: Mapped(lambda m, x: x @ m.w, w=torch.randn(WIDTH, 6))),
    Layer("tied", tied, tokens),
    Layer("called twice", lambda: Mapped(lambda m, x: m.core(torch.tanh(m.core(x))), core=nn.Linear(4, 4))),
    Layer("in place", lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))),
    Layer("frozen", frozen),
    Layer("positions", lambda: Mapped(lambda m, x: torch.tanh(x + m.p[:, :PLACES]), p=torch.randn(1, 8, WIDTH))),
    Layer(
        "positions from a table",
        lambda: Mapped(lambda m, x: torch.tanh(m.word(x) + m.place(torch.arange(PLACES))), word=table(), place=table()),
        tokens,
    ),
    Layer(
        "gain", lambda: Mapped(lambda m, x: torch.tanh(x) * m.gain + m.shift, gain=torch.ones(4), shift=torch.ones(1))
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
        "attention", lambda: Mapped(lambda m, x: m.core(x, x, x)[0], core=nn.MultiheadAttention(4, 2, batch_first=True))
    ),
    Layer("encoder", lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True)),
    Layer("dropout", lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.Dropout(0.4), nn.Linear(6, 2))),
    Layer("lstm", lambda: Mapped(lambda m, x: m.core(x)[0], core=nn.LSTM(WIDTH, 3, batch_first=True)), slow=LSTM),
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


def loss(outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Not linear in anything."""
    flat = torch.sin(outputs.flatten(1))
    return (flat * torch.arange(1.0, flat.shape[1] + 1).to(flat)).sum(1) + flat.square().sum(1) * batch[1]


def other_loss(outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Of the same outputs."""
    return (outputs.flatten(1) - batch[1][:, None]).square().sum(1)


def piece_of(layer: Layer, *, reduce: Any = "mean", sizes: Sequence[int] = (SLOTS,)) -> list[Piece]:
    """A step that trains on random rows."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        model, batches = layer.model(), [(layer.inputs()[:n], torch.randn(n)) for n in sizes]
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    random = {"cpu": bytes(torch.get_rng_state().tolist())}
    fed = tuple(Fed(tuple(range(n)), 0, "", random=random) for n in sizes)
    learning = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    step = Step(0, fed, ({"lr": 0.1},), 0.0)
    task = Task(model, [], loss, reduce=reduce)
    return Transition(task, Update("SGD", (learning,), ({"lr": 0.1},)), step, tuple(batches)).pieces()


def drawn(piece: Piece, rank: int = 9, **options: Any) -> Projection:
    """Of the parameters that learn."""
    params = piece.transition.task.parameters()
    shapes = {name: tuple(params[name].shape) for name in piece.transition.trained}
    return projection(shapes, rank=rank, like=torch.zeros((), dtype=torch.float64), **options)


def slopes(piece: Piece, params: Tree, buffers: Tree, loss: Callable[..., Tensor] = loss) -> list[Tree]:
    """Sample by sample, by autograd; a batch's statistics are constants."""
    piece.transition.set_modes()
    leaves = {name: params[name].clone().requires_grad_() for name in piece.transition.moving}
    with piece.randomness():
        outputs, _ = piece.transition.task.outputs(params | leaves, buffers, piece.batch)
    found = []
    for one in loss(outputs, piece.batch):
        grads = torch.autograd.grad(one, list(leaves.values()), retain_graph=True, allow_unused=True)
        found.append({n: torch.zeros_like(params[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)})
    return found


def by_hand(slopes: Sequence[Tree], drawn: Projection) -> Tensor:
    """Whole gradients times whole matrices, made of what unit vectors become."""
    rows = []
    for slope in slopes:
        parts = []
        for name, sides in drawn.sides.items():
            left = sides.left.reduce(torch.eye(sides.left.size).double())
            right = (
                torch.ones(1, 1).double()
                if sides.right is None
                else sides.right.reduce(torch.eye(sides.right.size).double())
            )
            parts.append(
                torch.einsum("ij,ip,jq->pq", slope[name].reshape(len(left), len(right)), left, right).flatten()
            )
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def frozen_statistics(piece: Piece, params: Tree, buffers: Tree) -> Piece:
    """The same model in eval mode with the batch's statistics as its running ones (a first layer's)."""
    x = piece.batch[0]
    axes = [axis for axis in range(x.dim()) if axis != 1]
    for name in tracking(piece.transition.task.model):
        buffers |= {f"{name}.running_mean": x.mean(axes), f"{name}.running_var": x.var(axes, correction=0)}
    evaluating = tuple(tracking(piece.transition.task.model))
    step = Step(0, piece.transition.step.fed, ({},), 0.0, evaluating=evaluating)
    return Piece(replace(piece.transition, step=step), piece.index, piece.share)


@pytest.mark.parametrize("kind", ["gaussian", "mask"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_are_projected_gradients_of_single_samples(layer: Layer, kind: Any) -> None:
    """For every kind of layer, two losses and two sets of reductions; the step's own gradient to the bit."""
    (piece,) = piece_of(layer)
    params, buffers = piece.transition.task.parameters(), piece.transition.task.buffers()
    plain = drawn(piece, kind=kind)
    factors = {n: tuple(torch.rand(s).double() for s in capture.Sides.sizes(params[n].shape)) for n in plain.sides}
    scaled = plain.scaled(factors)
    found = captured(piece, params, buffers, sides=(plain.sides, scaled.sides), losses=(other_loss,))
    assert next(iter(capture._PROVEN[piece.transition.task.binding].values())) == frozenset(layer.slow)
    still = frozen_statistics(piece, params, dict(buffers)) if layer.name == "batchnorm" else piece
    still_buffers = dict(buffers)
    if layer.name == "batchnorm":
        frozen_statistics(piece, params, still_buffers)
    for rows, one in zip(found.rows, (loss, other_loss), strict=True):
        wanted = slopes(still, params, buffers_of(still, buffers), one)
        for got, sides in zip(rows, (plain, scaled), strict=True):
            expected = by_hand(wanted, sides)
            assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    piece.transition.set_modes()
    gradient, after, losses = piece.gradient(params, buffers, None)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.buffers, after, rtol=0, atol=0)
    torch.testing.assert_close(found.losses, losses, rtol=0, atol=0)


def buffers_of(piece: Piece, buffers: Tree) -> Tree:
    """With the batch's statistics where they are frozen."""
    own = dict(buffers)
    if piece.transition.step.evaluating:
        frozen_statistics(piece, {}, own)
        x = piece.batch[0]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        for name in tracking(piece.transition.task.model):
            own |= {f"{name}.running_mean": x.mean(axes), f"{name}.running_var": x.var(axes, correction=0)}
    return own
