"""The training that all libraries attribute: a small GPT-2, AdamW, a linearly falling rate."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import backtrail

RATE, BETAS, DECAY = 1e-3, (0.9, 0.999), 0.01
SEED = 42  # of the order of the documents
Result = TypeVar("Result")
Rule = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


@final
@dataclass(frozen=True, slots=True)
class Size:
    """How large a training is, and Adam's epsilon."""

    words: int
    context: int
    documents: int
    slots: int
    width: int
    eps: float

    @property
    def steps(self) -> int:
        """Every document is seen once."""
        return self.documents // self.slots


FULL = Size(
    words=288, context=64, documents=512, slots=16, width=64, eps=1e-6
)  # 141 k parameters untied, 32 steps
# The first update is g / (|g| + eps), with a kink at 0: differences through it settle only at
# nudges far below eps.
SMALL = Size(words=32, context=16, documents=64, slots=8, width=16, eps=1e-4)


@final
@dataclass(frozen=True)
class Case:
    """One training: its size, its precision, and whether the output layer is the embedding."""

    size: Size
    tied: bool = field(default=False, kw_only=True)
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)

    def model(self) -> GPT2LMHeadModel:
        """The network at its start; without dropout, and with the attention that bergson needs."""
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "n_positions": self.size.context,
            "n_embd": self.size.width,
            "n_layer": 2,
            "n_head": 4,
        }
        still: dict[str, Any] = {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "use_cache": False,
        }
        ends: dict[str, Any] = {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": self.tied,
        }
        config = GPT2Config(
            vocab_size=self.size.words, attn_implementation="eager", **shape, **still, **ends
        )
        return GPT2LMHeadModel(config).to(dtype=self.dtype)

    @cached_property
    def data(self) -> TensorDataset:
        """The documents to train on."""
        return documents(self.size, self.size.documents, seed=1)

    def held_out(self, count: int) -> TensorDataset:
        """Documents to ask about."""
        return documents(self.size, count, seed=2)

    @cached_property
    def order(self) -> list[int]:
        """The documents in the order in which bergson shuffles them."""
        rows: Any = Dataset.from_dict({"row": list(range(self.size.documents))}).shuffle(seed=SEED)[
            "row"
        ]
        return [int(row) for row in rows]

    def loader(self) -> "DataLoader[Any]":
        """The batches of the one epoch, in that order."""
        starts = range(0, self.size.documents, self.size.slots)
        return DataLoader(
            self.data, batch_sampler=[self.order[at : at + self.size.slots] for at in starts]
        )

    def task(self) -> backtrail.Task:
        """Model, data and loss, for backtrail and for the loop."""
        return backtrail.language_model(self.model(), self.data, predict=logits)


def logits(model: nn.Module, batch: Any) -> Tensor:
    """Scores of the next word, `[slot, token, word]`."""
    found: Tensor = model(input_ids=batch[0]).logits
    return found


def documents(size: Size, count: int, *, seed: int) -> TensorDataset:
    """Chains of words, each followed by one of four; and the same shifted by one, then -100."""
    followers = torch.randint(
        size.words, (size.words, 4), generator=torch.Generator().manual_seed(0)
    )
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(size.words, (count,), generator=draw)]
    for _ in range(size.context - 1):
        words.append(followers[words[-1], torch.randint(4, (count,), generator=draw)])
    ids = torch.stack(words, 1)
    return TensorDataset(ids, torch.cat([ids[:, 1:], torch.full((count, 1), -100)], 1))


def adamw(case: Case, model: nn.Module) -> Rule:
    """One group, decay for all, as bergson has it; the rate falls linearly from the first step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, eps=case.size.eps, weight_decay=DECAY
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / case.size.steps
    )


def train(
    task: backtrail.Task,
    batches: Iterable[Any],
    rule: Rule,
    *,
    after: Callable[[int], None] | None = None,
) -> None:
    """The loop as users write it; `after` is called after every update."""
    optimizer, scheduler = rule
    for step, batch in enumerate(batches):
        task.loss(task.predict(task.model, batch), batch).mean().backward()
        optimizer.step()
        if after is not None:
            after(step)
        scheduler.step()
        optimizer.zero_grad()


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock time of one call, and what it returned."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def plain(case: Case) -> tuple[float, backtrail.Task]:
    """Time of the loop alone, and the trained model."""
    task = case.task()
    rule = adamw(case, task.model)
    spent, _ = timed(lambda: train(task, case.loader(), rule))
    return spent, task


def record(case: Case, folder: Path) -> tuple[float, backtrail.Run]:
    """Time of the loop with backtrail's recorder, every state kept, and the run."""
    task = case.task()
    rule = adamw(case, task.model)

    def recorded() -> None:
        with backtrail.Recorder(folder, task, rule[0], checkpoints=backtrail.Every(1)) as recorder:
            train(task, recorder.watch(case.loader()), rule)

    spent, _ = timed(recorded)
    return spent, backtrail.open_run(folder, task)


def distance(case: Case, one: nn.Module, other: nn.Module) -> float:
    """How far two trained networks lie apart, as a share of the way from the start."""
    begun, first, second = (dict(model.named_parameters()) for model in (case.model(), one, other))
    gap, way = (
        sum(float((first[name] - tensors[name]).square().sum()) for name in first)
        for tensors in (second, begun)
    )
    return float((gap / way) ** 0.5)
