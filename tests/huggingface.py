"""Rows of the exactness test with models of `transformers` and `peft`.

The models are made from configurations, with random weights: nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

import backtrail
from tests.gate import Row

transformers = pytest.importorskip("transformers", reason="pip install 'backtrail[hf]'")
tokenizers = pytest.importorskip("tokenizers")  # comes with transformers
peft = pytest.importorskip("peft", reason="pip install 'backtrail[hf]'")

VOCABULARY = 11
LENGTH = 5
COUNT = 5
EPOCHS = [[[0, 1], [2, 3, 4]], [[4, 0], [3, 1]]]
# With the usual 0.02 a network as narrow as these has gradients of 1e-8. They are as small as
# Adam's epsilon, where its step is not linear within any difference.
WIDE = {"initializer_range": 0.5}
Rows = list[dict[str, Tensor]]


def gpt2() -> nn.Module:
    """Make a tiny GPT-2, whose head has the weight of its embedding, with dropout."""
    config = transformers.GPT2Config(
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        **WIDE,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def adapted() -> nn.Module:
    """Make a GPT-2 in which only low-rank adapters of the attention learn, with dropout."""
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model: nn.Module = peft.get_peft_model(gpt2(), config)
    return model


def bert() -> nn.Module:
    """Make a tiny BERT that classifies sentences."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=LENGTH,
        num_labels=3,
        **WIDE,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def vit() -> nn.Module:
    """Make a tiny ViT that classifies images."""
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        **WIDE,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def texts(seed: int = 0, *, prompt: int = 0) -> Rows:
    """Draw sentences of different lengths; padding and the first `prompt` tokens are no labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (COUNT, LENGTH), generator=draw)
    places = torch.arange(LENGTH)
    lengths = torch.tensor([5, 3, 4, 5, 2])
    mask = (places < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (places < prompt), -100)
    rows = []
    for row in range(COUNT):
        rows.append({"input_ids": ids[row], "attention_mask": mask[row], "labels": labels[row]})
    return rows


def labelled(seed: int = 0) -> Rows:
    """Draw sentences with class numbers."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (COUNT,), generator=draw)
    return [row | {"labels": label} for row, label in zip(texts(seed), labels, strict=True)]


def images(seed: int = 0) -> Rows:
    """Draw images of one channel with class numbers."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(COUNT, 1, 4, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(3, (COUNT,), generator=draw)
    rows = []
    for image, label in zip(pixels, labels, strict=True):
        rows.append({"pixel_values": image, "labels": label})
    return rows


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a batch."""
    # Without labels the model takes no loss of its own, which would be rounded to float32.
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits


def language_model_row(name: str, model: Callable[[], nn.Module], data: Callable[[], Rows]) -> Row:
    """Make the row of a language model whose loss is the mean over all tokens of a batch."""

    def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = logits_of(model, batch)[:, :-1]
        targets = batch["labels"][:, 1:]
        return cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    def loss(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
        targets = (batch["labels"][:, 1:] != -100).sum()
        return (token_losses(model, batch) * weights[:, None]).sum() / targets

    def task(model: nn.Module, data: Any) -> backtrail.Task:
        return backtrail.language_model(model, data, reduce=backtrail.TokenMean())

    def read(model: nn.Module) -> Tensor:
        losses = token_losses(model, default_collate(texts(seed=1)))
        # Row 1 predicts two tokens.
        return torch.stack([losses[1].sum() / 2, losses.mean()])

    return Row(name, model, data, loss, task, read, EPOCHS)


def classifier_row(name: str, model: Callable[[], nn.Module], data: Callable[..., Rows]) -> Row:
    """Make the row of a classifier."""

    def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(logits_of(model, batch), batch["labels"], reduction="none")

    def loss(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
        return (row_losses(model, batch) * weights).mean()

    def read(model: nn.Module) -> Tensor:
        losses = row_losses(model, default_collate(data(seed=1)))
        return torch.stack([losses[1], losses.mean()])

    return Row(name, model, data, loss, backtrail.classification, read, EPOCHS)


ROWS = [
    language_model_row("GPT-2, tied, dropout", gpt2, texts),
    language_model_row("GPT-2, frozen, with LoRA", adapted, lambda: texts(prompt=1)),
    classifier_row("BERT, padding", bert, labelled),
    classifier_row("ViT", vit, images),
]
