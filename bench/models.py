"""The networks and data that the measurements run on."""

import string

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.data import TensorDataset

WORDS = (
    "the a one some old new small bright river stone tree bird light sea wind road "
    "sings falls turns waits runs"
)
LETTERS = string.ascii_letters + string.digits + " .\n"


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        nn.Module.__init__(self)
        self.heads, self.causal = heads, causal
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[slot, token, width] to the same."""
        split = self.attend(self.before(x)).unflatten(
            -1, (3, self.heads, -1)
        )  # [slot, token, 3, head, width]
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.between(x))))


class GPT(nn.Module):
    """A small causal language model; 818 k parameters by default."""

    def __init__(
        self, tokens: int = 65, width: int = 128, *, layers: int = 4, context: int = 64
    ) -> None:
        nn.Module.__init__(self)
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """[slot, token] to logits [slot, token, vocabulary]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))


def sentences(rows: int, context: int = 64) -> TensorDataset:
    """Sequences of letters of invented sentences, and the same shifted by one."""
    draw = torch.Generator().manual_seed(0)
    words = WORDS.split()
    picks = torch.randint(0, len(words), (rows * context,), generator=draw).tolist()
    letters = " ".join(words[pick] for pick in picks)[: rows * context + 1]
    ids = torch.tensor([LETTERS.index(letter) for letter in letters])
    return TensorDataset(ids[:-1].view(rows, context), ids[1:].view(rows, context))


def mlp(activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """64-128-128-10."""
    return nn.Sequential(
        nn.Linear(64, 128), activation(), nn.Linear(128, 128), activation(), nn.Linear(128, 10)
    )


def digits(*, standardised: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits, 1,400 to train on and 397 to test on; brightness 0 to 4.

    Standardised, every pixel has mean 0 and deviation 1, or is 0 throughout.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 4, torch.tensor(labels)
    if standardised:
        x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


class ViT(nn.Module):
    """A small vision transformer: square patches, full attention, the mean of all patches."""

    def __init__(
        self, shape: tuple[int, int, int], patch: int, *, width: int = 32, layers: int = 2
    ) -> None:
        nn.Module.__init__(self)
        channels, height, across = shape
        self.patch = patch
        self.cut = nn.Linear(channels * patch * patch, width)
        self.place = nn.Embedding((height // patch) * (across // patch), width)
        self.blocks = nn.Sequential(*[Block(width, 4, causal=False) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[slot, channel, row, column] to logits [slot, class]."""
        rows = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [slot, patch, pixel]
        x = self.cut(patches) + self.place(torch.arange(patches.shape[1], device=images.device))
        return self.head(self.norm(self.blocks(x)).mean(1))


def batchnorm_cnn(channels: int, width: int = 8) -> nn.Sequential:
    """Two convolutions, each with BatchNorm; the second halves the picture."""
    first = nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()
    second = (
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.GELU(),
    )
    return nn.Sequential(
        *first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10)
    )
