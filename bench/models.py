"""The networks and data that the measurements run on."""

import string

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.data import TensorDataset

WORDS = "the a one some old new small bright river stone tree bird light sea wind road sings falls turns waits runs"
LETTERS = string.ascii_letters + string.digits + " .\n"


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[slot, token, width] to the same."""
        split = self.attend(self.before(x)).unflatten(-1, (3, self.heads, -1))  # [slot, token, 3, head, width]
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.between(x))))


class GPT(nn.Module):
    """A small causal language model; 818 k parameters by default."""

    def __init__(self, tokens: int = 65, width: int = 128, *, layers: int = 4, context: int = 64) -> None:
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
    return nn.Sequential(nn.Linear(64, 128), activation(), nn.Linear(128, 128), activation(), nn.Linear(128, 10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits, 1,400 to train on and 397 to test on; brightness 0 to 4."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 4, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
