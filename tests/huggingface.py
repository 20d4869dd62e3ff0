"""Rows of the exactness gate with models of `transformers` and `peft`, made from configurations: nothing is fetched."""

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

VOCABULARY, LENGTH, COUNT = 11, 5, 5
EPOCHS = [[[0, 1], [2, 3, 4]], [[4, 0], [3, 1]]]
# With the usual 0.02 a network as narrow as these has gradients of 1e-8, where Adam bends within
# any nudge.
WIDE = {"initializer_range": 0.5}
Rows = list[dict[str, Tensor]]


def gpt2() -> nn.Module:
    """A tiny GPT-2, whose head is its embedding, with dropout everywhere."""
    size = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **ends, **WIDE))
    return model


def adapted() -> nn.Module:
    """Low-rank adapters, with dropout, on the attention of a GPT-2 that does not learn."""
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model: nn.Module = peft.get_peft_model(gpt2(), config)
    return model


def bert() -> nn.Module:
    """A tiny BERT that classifies sentences."""
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
    """A tiny ViT that classifies images."""
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
    """Sentences of different lengths; padding, and the first tokens of a prompt, are no labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (COUNT, LENGTH), generator=draw)
    mask = (torch.arange(LENGTH) < torch.tensor([5, 3, 4, 5, 2])[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(LENGTH) < prompt), -100)
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(ids, mask, labels, strict=True)]


def labelled(seed: int = 0) -> Rows:
    """Sentences of classes."""
    labels = torch.randint(3, (COUNT,), generator=torch.Generator().manual_seed(seed))
    return [row | {"labels": label} for row, label in zip(texts(seed), labels, strict=True)]


def images(seed: int = 0) -> Rows:
    """Images of classes."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(COUNT, 1, 4, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(3, (COUNT,), generator=draw)
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(pixels, labels, strict=True)
    ]


def called(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits. The model's own loss is of no use here: it rounds to float32."""
    logits: Tensor = model(
        **{name: value for name, value in batch.items() if name != "labels"}
    ).logits
    return logits


def speaking(name: str, model: Callable[[], nn.Module], data: Callable[[], Rows]) -> Row:
    """A language model, with the mean over all tokens that Hugging Face's models take."""

    def nats(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = called(model, batch)[:, :-1], batch["labels"][:, 1:]
        return cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    def loss(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
        return (nats(model, batch) * weights[:, None]).sum() / (
            batch["labels"][:, 1:] != -100
        ).sum()

    def task(model: nn.Module, data: Any) -> backtrail.Task:
        return backtrail.language_model(model, data, reduce=backtrail.TokenMean())

    def read(model: nn.Module) -> Tensor:
        found = nats(model, default_collate(texts(seed=1)))
        return torch.stack([found[1].sum() / 2, found.mean()])  # row 1 predicts two tokens

    return Row(name, model, data, loss, task, read, EPOCHS)


def sorting(name: str, model: Callable[[], nn.Module], data: Callable[..., Rows]) -> Row:
    """A classifier."""

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(called(model, batch), batch["labels"], reduction="none")

    def read(model: nn.Module) -> Tensor:
        found = losses(model, default_collate(data(seed=1)))
        return torch.stack([found[1], found.mean()])

    def loss(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
        return (losses(model, batch) * weights).mean()

    return Row(name, model, data, loss, backtrail.classification, read, EPOCHS)


ROWS = [
    speaking("GPT-2, tied, dropout", gpt2, texts),
    speaking("GPT-2, frozen, with LoRA", adapted, lambda: texts(prompt=1)),
    sorting("BERT, padding", bert, labelled),
    sorting("ViT", vit, images),
]
