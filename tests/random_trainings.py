"""Random small trainings: layers, losses, optimizers, schedules; and their true influence.

The loop in `Training.run` is plain PyTorch and calls nothing of backtrail but what is passed in as
`watch`. True influence is a central difference of it: one slot's weight is nudged, both ways.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import backtrail

WIDTH = 6
CLASSES = 3
ROWS = 12
BATCH = 3
NUDGE = 1e-5
BAR = 1e-6
DOUBLE = torch.float64
Layer = Callable[[], nn.Module]
RowLoss = Callable[[Tensor, Tensor], Tensor]


class Apply(nn.Module):
    """A function of `[row, feature]` as a module."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function with the input and the parts."""
        return self.function(x, *self.parts)


class Drawing(nn.Module):
    """A function that draws random numbers, in training alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call the function, or a smooth one in eval mode."""
        return self.function(x) if self.training else torch.tanh(x)


class Centred(nn.Module):
    """Subtracts a running mean that it keeps itself, without a gradient."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Update the mean in training, and subtract it."""
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


class Scaled(nn.Module):
    """Multiplies by a parameter without axes, and by a running scale that is assigned anew."""

    size: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.register_buffer("size", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Update the size in training, and divide by it."""
        if self.training:
            self.size = 0.9 * self.size + 0.1 * x.detach().square().mean().sqrt()
        return x * self.scale / self.size


class Queue(nn.Module):
    """Attends to the outputs of earlier batches, as MoCo's queue of keys."""

    keys: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(4, WIDTH))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Read the queue, then replace one of its entries."""
        keys = self.keys.clone()
        read = torch.softmax(x @ keys.T, 1) @ keys
        if self.training:
            with torch.no_grad():
                place = int(self.place)
                self.keys[place] = x.mean(0)
                self.place.copy_((self.place + 1) % 4)
        return x + read


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the input."""
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Reverse the gradient."""
        del ctx
        return -gradient


class Clipped(torch.autograd.Function):
    """The square, whose gradient is clipped."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Square the input."""
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep the input."""
        del output
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Pass a clipped gradient."""
        (x,) = ctx.saved_tensors
        return gradient * (2 * x).clamp(-0.5, 0.5)


def tokens(x: Tensor) -> Tensor:
    """Whole numbers 0 to 4 that depend on the data alone, `[row, 2]`."""
    return (x.detach()[:, :2] * 2).round().long().abs() % 5


def steps(x: Tensor) -> Tensor:
    """The features as a sequence of two vectors, `[row, time, 3]`."""
    return x.view(len(x), 2, 3)


def channels(module: nn.Module) -> Layer:
    """Apply a module to `[row, channel, place]`, and flatten its output to the first features."""

    def made() -> nn.Module:
        return Apply(lambda x, part: to_width(part(x.view(len(x), 2, 3))), module_copy(module))

    return made


def module_copy(module: nn.Module) -> nn.Module:
    """A module of the same kind with new parameters."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return copied


def to_width(x: Tensor) -> Tensor:
    """Flatten, and repeat or cut to `WIDTH` features."""
    flat = x.flatten(1)
    return torch.cat([flat] * (WIDTH // flat.shape[1] + 1), 1)[:, :WIDTH]


def surrounded(function: Callable[..., Tensor]) -> Layer:
    """A function between two linear layers, so that it is a part of a curved loss."""
    return lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(function), nn.Linear(WIDTH, WIDTH))


def drawing(function: Callable[[Tensor], Tensor]) -> Layer:
    """The same of a function that draws random numbers."""
    return lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), Drawing(function), nn.Linear(WIDTH, WIDTH)
    )


def packed(x: Tensor, network: nn.Module) -> Tensor:
    """A recurrent network over packed sequences of lengths 2 and 1."""
    lengths = torch.tensor([2, 1] * len(x))[: len(x)].sort(descending=True).values
    sequence = pack_padded_sequence(steps(x), lengths, batch_first=True)
    return to_width(pad_packed_sequence(network(sequence)[0], batch_first=True, total_length=2)[0])


def straight_through(x: Tensor) -> Tensor:
    """Rounding, trained as the identity."""
    return x + (x.round() - x).detach()


def without_grad(x: Tensor) -> Tensor:
    """A scale that is computed without a gradient, in several operations."""
    with torch.no_grad():
        scale = x.square().mean(1, keepdim=True)
        scale = scale.sqrt()
        scale.add_(0.5)
    return x / scale


def read_data(x: Tensor) -> Tensor:
    """A target read from `.data`."""
    return torch.tanh(x) * x.flip(1).data


def segments(x: Tensor) -> Tensor:
    """Means of pairs of features."""
    values = torch.tanh(x).reshape(-1)
    pairs = torch.full((len(values) // 2,), 2)
    means = torch.segment_reduce(values, "mean", lengths=pairs)
    return to_width(means.reshape(len(x), -1))


class NumpyTanh(torch.autograd.Function):
    """Tanh, which nobody but NumPy sees, with a first derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Compute tanh."""
        found = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiply by the derivative."""
        (found,) = ctx.saved_tensors
        return gradient * (1 - found * found)


def numpy_tanh(x: Tensor) -> Tensor:
    """Tanh by NumPy."""
    found: Tensor = NumpyTanh.apply(x)
    return found


def half(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply to the first three features, and keep the rest."""
    return lambda x: torch.cat([function(x[:, :3]), x[:, 3:]], 1)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "celu": functional.celu,
    "selu": functional.selu,
    "logsigmoid": functional.logsigmoid,
    "softsign": functional.softsign,
    "tanhshrink": functional.tanhshrink,
    "softmax": lambda x: functional.softmax(x, 1),
    "log_softmax": lambda x: functional.log_softmax(x, 1),
    "softmin": lambda x: functional.softmin(x, 1),
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "hardtanh": functional.hardtanh,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "rrelu": lambda x: functional.rrelu(x, training=True),
    "softshrink": functional.softshrink,
    "hardshrink": functional.hardshrink,
    "threshold": lambda x: functional.threshold(x, 0.1, 0.0),
    "glu": lambda x: to_width(functional.glu(x, 1)),
    "normalize": lambda x: functional.normalize(x, dim=1),
    "cosine similarity": lambda x: x * functional.cosine_similarity(x, x.flip(1)).unsqueeze(1),
    "pairwise distance": lambda x: x * functional.pairwise_distance(x, x.roll(1, 1)).unsqueeze(1),
    "cdist": lambda x: x + torch.cdist(steps(x), steps(x) + 1).mean((1, 2)).unsqueeze(1),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "cumsum": lambda x: torch.cumsum(torch.tanh(x), 1),
    "cumprod": lambda x: torch.cumprod(1 + 0.1 * x, 1),
    "prod": lambda x: x * (1 + x).prod(1, keepdim=True),
    "sort": lambda x: torch.sort(torch.tanh(x), 1).values,
    "topk": lambda x: to_width(torch.topk(torch.tanh(x), 3, 1).values),
    "max": lambda x: torch.tanh(x) * x.max(1, keepdim=True).values,
    "median": lambda x: torch.tanh(x) * x.median(1, keepdim=True).values,
    "std": lambda x: x / x.std(1, keepdim=True),
    "einsum": lambda x: torch.einsum("bi,bj->bi", torch.tanh(x), x),
    "matrix exponential": lambda x: to_width(
        torch.linalg.matrix_exp(0.3 * torch.tanh(steps(x).transpose(1, 2) @ steps(x)))
    ),
    "solve": lambda x: to_width(
        torch.linalg.solve(
            torch.eye(3) + steps(x).transpose(1, 2) @ steps(x), steps(x).transpose(1, 2)
        )
    ),
    "fft": lambda x: torch.fft.rfft(torch.tanh(x)).abs().repeat(1, 2)[:, :WIDTH],
    "erf": torch.erf,
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(1)),
    "where": lambda x: torch.where(x > 0, x.sin(), 0.5 * x),
    "clamp": lambda x: torch.clamp(x, -0.7, 0.7) ** 2,
    "attention": lambda x: functional.scaled_dot_product_attention(
        steps(x), steps(x), steps(x)
    ).flatten(1),
    "interpolate": lambda x: functional.interpolate(
        steps(torch.tanh(x)), size=5, mode="linear"
    ).flatten(1)[:, :WIDTH],
    "grid_sample": lambda x: to_width(
        functional.grid_sample(
            x.view(-1, 1, 2, 3), torch.tanh(x).view(-1, 1, 3, 2), align_corners=False
        )
    ),
    "gumbel": lambda x: functional.gumbel_softmax(x, hard=False),
    "segments": segments,
    "numpy": numpy_tanh,
}
SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: torch.tanh(x) * x.detach(),
    "detach of a function": lambda x: torch.tanh(x) - 0.5 * torch.tanh(x.flip(1)).detach(),
    "no_grad": without_grad,
    ".data": read_data,
    "straight-through": straight_through,
    "hard gumbel": lambda x: functional.gumbel_softmax(x, hard=True) + torch.tanh(x),
    "gradient reversal": lambda x: torch.tanh(Reversed.apply(torch.tanh(x))),
    "clipped gradient": lambda x: torch.tanh(Clipped.apply(torch.tanh(x))),
    "inference of a scale": lambda x: x / x.detach().abs().amax(1, keepdim=True),
    "noise with a mean": lambda x: torch.normal(torch.tanh(x), torch.ones_like(x) * 0.1),
    "sample of a distribution": lambda x: (
        torch.tanh(x) * torch.distributions.Normal(x, torch.ones_like(x)).sample()
    ),
    "fake quantisation": lambda x: torch.tanh(
        torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x)
    ),
}
MODULES: dict[str, Layer] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "bilinear": lambda: Apply(lambda x, part: part(x, torch.tanh(x)), nn.Bilinear(6, 6, 6)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "weight norm, whole": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH), dim=-1),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: parametrizations.orthogonal(
        nn.Linear(WIDTH, WIDTH), orthogonal_map="cayley"
    ),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch norm, average": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "instance norm": channels(nn.InstanceNorm1d(2, affine=True)),
    "instance norm, running": channels(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)),
    "local response norm": channels(nn.LocalResponseNorm(2)),
    "prelu": lambda: nn.PReLU(WIDTH),
    "convolution": channels(nn.Conv1d(2, 3, 2)),
    "transposed convolution": channels(nn.ConvTranspose1d(2, 3, 2)),
    "grouped convolution": channels(nn.Conv1d(2, 4, 2, groups=2, padding=1)),
    "2d convolution": lambda: Apply(
        lambda x, part: to_width(part(x.view(-1, 1, 2, 3))), nn.Conv2d(1, 2, 2)
    ),
    "average pooling": channels(nn.AvgPool1d(2)),
    "max pooling": channels(nn.MaxPool1d(2)),
    "lp pooling": channels(nn.LPPool1d(3, 2)),
    "adaptive pooling": channels(nn.AdaptiveAvgPool1d(2)),
    "upsampling": channels(nn.Upsample(scale_factor=2)),
    "rnn": lambda: Apply(
        lambda x, part: to_width(part(steps(x))[0]), nn.RNN(3, 3, batch_first=True)
    ),
    "lstm": lambda: Apply(
        lambda x, part: to_width(part(steps(x))[0]), nn.LSTM(3, 3, batch_first=True)
    ),
    "gru": lambda: Apply(
        lambda x, part: to_width(part(steps(x))[0]), nn.GRU(3, 3, batch_first=True)
    ),
    "packed gru": lambda: Apply(packed, nn.GRU(3, 3, batch_first=True)),
    "multihead attention": lambda: Apply(
        lambda x, part: part(steps(x), steps(x), steps(x))[0].flatten(1),
        nn.MultiheadAttention(3, 1, batch_first=True),
    ),
    "transformer layer": lambda: Apply(
        lambda x, part: part(steps(x)).flatten(1),
        nn.TransformerEncoderLayer(3, 1, 4, batch_first=True),
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)),
    "alpha dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.AlphaDropout(0.3)),
    "channel dropout": channels(nn.Dropout1d(0.3)),
    "embedding": lambda: Apply(lambda x, part: x + part(tokens(x)).flatten(1), nn.Embedding(5, 3)),
    "embedding, padded": lambda: Apply(
        lambda x, part: torch.tanh(x + part(tokens(x)).flatten(1)) @ tied(part),
        nn.Embedding(5, 3, padding_idx=1),
    ),
    "embedding, by frequency": lambda: Apply(
        lambda x, part: torch.tanh(x + part(tokens(x)).flatten(1)),
        nn.Embedding(5, 3, scale_grad_by_freq=True),
    ),
    "embedding bag": lambda: Apply(
        lambda x, part: x + part(tokens(x)).repeat(1, 2), nn.EmbeddingBag(5, 3)
    ),
    "embedding bag, max": lambda: Apply(
        lambda x, part: x + part(tokens(x)).repeat(1, 2), nn.EmbeddingBag(5, 3, mode="max")
    ),
    "running mean": Centred,
    "running scale": Scaled,
    "queue": Queue,
}
DRAWING = {"rrelu", "gumbel", "hard gumbel", "noise with a mean", "sample of a distribution"}
LAYERS: dict[str, Layer] = {
    name: drawing(function) if name in DRAWING else surrounded(function)
    for name, function in (PLAIN | SURROGATES).items()
} | MODULES


def tied(embedding: nn.Module) -> Tensor:
    """A square matrix that is made of an embedding's weight."""
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    return 0.1 * torch.cat([weight.T @ weight] * 2, 1).repeat(2, 1)


def one_hot(labels: Tensor) -> Tensor:
    """Labels as signs, `[row, class]`."""
    return 2 * functional.one_hot(labels, CLASSES).to(DOUBLE) - 1


LOSSES: dict[str, RowLoss] = {
    "cross-entropy": lambda x, y: functional.cross_entropy(x, y, reduction="none"),
    "label smoothing": lambda x, y: functional.cross_entropy(
        x, y, reduction="none", label_smoothing=0.1
    ),
    "class weights": lambda x, y: functional.cross_entropy(
        x, y, weight=torch.tensor([1.0, 2.0, 0.5]).to(x), reduction="none"
    ),
    "soft targets": lambda x, y: functional.cross_entropy(
        x, torch.softmax(one_hot(y), 1), reduction="none"
    ),
    "squared error": lambda x, y: functional.mse_loss(x, one_hot(y), reduction="none").mean(1),
    "absolute error": lambda x, y: functional.l1_loss(x, one_hot(y), reduction="none").mean(1),
    "smooth l1": lambda x, y: functional.smooth_l1_loss(x, one_hot(y), reduction="none").mean(1),
    "huber": lambda x, y: functional.huber_loss(x, one_hot(y), reduction="none").mean(1),
    "binary cross-entropy": lambda x, y: functional.binary_cross_entropy_with_logits(
        x, (one_hot(y) + 1) / 2, reduction="none"
    ).mean(1),
    "kl divergence": lambda x, y: functional.kl_div(
        functional.log_softmax(x, 1), torch.softmax(one_hot(y), 1), reduction="none"
    ).sum(1),
    "multi-margin": lambda x, y: functional.multi_margin_loss(x, y, reduction="none"),
    "squared multi-margin": lambda x, y: functional.multi_margin_loss(x, y, p=2, reduction="none"),
    "soft margin": lambda x, y: functional.soft_margin_loss(x, one_hot(y), reduction="none").mean(
        1
    ),
    "multilabel margin": lambda x, y: functional.multilabel_margin_loss(
        x, torch.stack([y, -torch.ones_like(y), -torch.ones_like(y)], 1), reduction="none"
    ),
    "poisson": lambda x, y: functional.poisson_nll_loss(
        x, (one_hot(y) + 1) / 2, reduction="none"
    ).mean(1),
    "gaussian": lambda x, y: functional.gaussian_nll_loss(
        x[:, 0], y.to(x), functional.softplus(x[:, 1]) + 0.1, reduction="none"
    ),
    "hinge embedding": lambda x, y: functional.hinge_embedding_loss(
        x, one_hot(y), reduction="none"
    ).mean(1),
    "cosine embedding": lambda x, y: functional.cosine_embedding_loss(
        x, one_hot(y), torch.ones(len(x)).to(x), reduction="none"
    ),
    "triplet": lambda x, y: functional.triplet_margin_loss(
        x, one_hot(y), x.roll(1, 1), reduction="none"
    ),
    "ctc": lambda x, y: functional.ctc_loss(
        functional.log_softmax(torch.stack([x, x.roll(1, 1), x.roll(2, 1)]), 2),
        (y % 2 + 1).unsqueeze(1),
        torch.full((len(x),), 3),
        torch.full((len(x),), 1),
        reduction="none",
    ),
    "focal": lambda x, y: (
        (1 - torch.softmax(x, 1).gather(1, y[:, None])[:, 0].detach()) ** 2
        * functional.cross_entropy(x, y, reduction="none")
    ),
}
OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "SGD, momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "SGD, Nesterov": lambda groups: torch.optim.SGD(
        groups, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01
    ),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, eps=1e-3),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-3),
    "AdamW, amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-3, amsgrad=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, eps=1e-3, momentum=0.5),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, eps=1e-3),
}
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _: 1.0,
    "warm-up from 0": lambda step: min(1.0, step / 3),
    "decay to 0": lambda step: 1.0 - step / 7,
    "0 in the middle": lambda step: float(step != 3),
}


@dataclass(frozen=True)
class Training:
    """A small training in float64.

    Attributes:
        layers: names of its layers, between a first and a last linear one.
        loss: name of its loss.
        optimizer: name of its optimizer.
        schedule: name of its schedule of learning rates.
        accumulate: batches per step.
        clip: "norm", "value" or "none".
        frozen_group: whether the last layer is a parameter group of learning rate 0.
        seed: of parameters, data and random numbers.
    """

    layers: tuple[str, ...]
    loss: str
    optimizer: str = "SGD, momentum"
    schedule: str = "constant"
    accumulate: int = 1
    clip: str = "none"
    frozen_group: bool = False
    seed: int = 0
    data: TensorDataset = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Draw the data."""
        draw = torch.Generator().manual_seed(self.seed)
        inputs = torch.randn(ROWS, WIDTH, generator=draw, dtype=DOUBLE)
        labels = torch.randint(CLASSES, (ROWS,), generator=draw)
        object.__setattr__(self, "data", TensorDataset(inputs, labels))

    def row_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """The loss of every row."""
        return LOSSES[self.loss](outputs, batch[1])

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Make model and optimizer, always the same."""
        torch.manual_seed(self.seed)
        layers = [LAYERS[name]() for name in self.layers]
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers, nn.Linear(WIDTH, CLASSES))
        model = model.double().train()
        *firsts, last_layer = model.children()
        first = [p for layer in firsts for p in layer.parameters()]
        last: dict[str, Any] = {"params": list(last_layer.parameters())}
        if self.frozen_group:
            last["lr"] = 0.0
        return model, OPTIMIZERS[self.optimizer]([{"params": first}, last])

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Any],
        nudged: tuple[int, float] = (-1, 0.0),
    ) -> None:
        """Train; `nudged` is a slot, counted through the training, and the change of its weight."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[self.schedule])
        for number, batch in enumerate(batches):
            weights = torch.ones(BATCH, dtype=DOUBLE)
            if nudged[0] // BATCH == number:
                weights[nudged[0] % BATCH] += nudged[1]
            losses = self.row_losses(model(batch[0]), batch)
            ((losses * weights).mean() / self.accumulate).backward()
            if (number + 1) % self.accumulate:
                continue
            if self.clip == "norm":
                clip_grad_norm_(model.parameters(), 0.05)
            elif self.clip == "value":
                clip_grad_value_(model.parameters(), 0.02)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def batches(self) -> list[list[int]]:
        """Two epochs in order."""
        return [list(range(first, first + BATCH)) for first in range(0, ROWS, BATCH)] * 2

    def query(self, model: nn.Module) -> Tensor:
        """The mean loss of all rows, and one output."""
        inputs, labels = self.data.tensors
        outputs = model(inputs)
        return torch.stack(
            [functional.cross_entropy(outputs, labels), torch.tanh(outputs[3]).sum()]
        )

    def after(self, slot: int, change: float) -> np.ndarray:
        """The queries after a training in which one slot's weight is nudged."""
        model, optimizer = self.start()
        torch.manual_seed(self.seed + 1)
        loader = DataLoader(self.data, batch_sampler=self.batches())
        self.run(model, optimizer, loader, (slot, change))
        with torch.no_grad():
            return np.asarray(self.query(model.eval()).numpy())

    def influence(self, slots: list[int], folder: Path) -> np.ndarray:
        """Influence of slots on the queries by DIT, `[query, slot]`."""
        model, optimizer = self.start()
        clips: dict[str, Any] = {
            "norm": backtrail.ClipNorm(0.05),
            "value": backtrail.ClipValue(0.02),
            "none": None,
        }
        task = backtrail.Task(model, self.data, loss=self.row_losses, clip=clips[self.clip])
        recorder = backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Every(3))
        torch.manual_seed(self.seed + 1)
        with recorder:
            loader = DataLoader(self.data, batch_sampler=self.batches())
            self.run(model, optimizer, recorder.watch(loader))
        run = backtrail.open_run(folder, task)
        queries = backtrail.Custom(self.query, labels=["loss", "output"])
        values = backtrail.DIT().attribute(run, queries).values()[:, 0]
        return np.asarray(values.reshape(len(values), -1)[:, slots])

    def truth(self, slots: list[int], *, nudge: float = NUDGE) -> np.ndarray:
        """The same by central differences, `[query, slot]`."""
        columns = []
        for slot in slots:
            difference = self.after(slot, nudge) - self.after(slot, -nudge)
            columns.append(-difference / (2 * nudge))
        return np.stack(columns, axis=1)


def trainings() -> st.SearchStrategy[Training]:
    """Random trainings."""
    return st.builds(
        Training,
        layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3).map(tuple),
        loss=st.sampled_from(sorted(LOSSES)),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        schedule=st.sampled_from(sorted(SCHEDULES)),
        accumulate=st.sampled_from([1, 2]),
        clip=st.sampled_from(["none", "none", "norm", "value"]),
        frozen_group=st.booleans(),
        seed=st.integers(0, 1000),
    )
