"""bergson's MAGIC through its public command, in this process, with the time of its parts."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

import numpy as np
import torch
from bergson.config.config import DataConfig, LRScheduleConfig, QuerySetConfig
from bergson.data import load_scores
from bergson.magic import DataStream, MagicConfig, Trainer, prepare_trainer, run_magic
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import TensorDataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from bench.language.case import BETAS, DECAY, RATE, SEED, Case

PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What one command gave: seconds of training, of each backward pass, of the whole; and scores.

    The scores are d query / d weight, `[query, document]`: the negative of an influence.
    """

    forward: float
    backward: tuple[float, ...]
    whole: float
    scores: np.ndarray
    trained: GPT2LMHeadModel


def config(case: Case, folder: Path, queries: TensorDataset, *, aggregation: str) -> MagicConfig:
    """The same training in bergson's words, its model and data written where it wants them."""
    model = folder / "model"
    case.model().save_pretrained(model)
    words = Tokenizer(
        WordLevel({f"word{number}": number for number in range(case.size.words)}, unk_token="word0")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="word0", model_max_length=case.size.context
    )
    tokenizer.save_pretrained(model)
    with quiet():
        rows(case.data).save_to_disk(folder / "train")
        rows(queries).save_to_disk(folder / "queries")
    return MagicConfig(
        run_path=str(folder / "run"),
        model=str(model),
        precision=PRECISIONS[case.dtype],
        data=DataConfig(dataset=str(folder / "train")),
        query=QuerySetConfig(dataset=str(folder / "queries"), aggregation=aggregation),
        lr_schedule=LRScheduleConfig(lr=RATE, lr_scheduler_type="linear"),
        batch_size=case.size.slots,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=case.size.eps,
        weight_decay=DECAY,
        seed=SEED,
        save_models=True,
        wandb_project="",
    )


def rows(data: TensorDataset) -> Dataset:
    """Tokens as bergson reads them."""
    ids = data.tensors[0].tolist()
    return Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]})


def attribute(
    case: Case, folder: Path, queries: TensorDataset, *, aggregation: str = "none"
) -> Answer:
    """Train, and go back once for every query ("none") or once for their mean."""
    asked = config(case, folder, queries, aggregation=aggregation)
    begun = time.perf_counter()
    with quiet(), timed("train") as forward, timed("backward") as backward:
        run_magic(asked)
    whole = time.perf_counter() - begun
    scores = np.asarray(load_scores(folder / "run" / "scores")[:]).T
    trained = GPT2LMHeadModel.from_pretrained(
        folder / "run" / "retrained" / "base", dtype=case.dtype
    )
    return Answer(sum(forward), tuple(backward), whole, scores, trained)


@contextmanager
def timed(method: str) -> Iterator[list[float]]:
    """Seconds of every call of a method of bergson's trainer."""
    found: list[float] = []
    original = getattr(Trainer, method)

    def measured(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        result = original(*given, **named)
        found.append(time.perf_counter() - begun)
        return result

    with patch.object(Trainer, method, measured):
        yield found


@contextmanager
def quiet() -> Iterator[None]:
    """Without its progress bars and prints."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def retrained(case: Case, folder: Path, queries: TensorDataset) -> Callable[[int, float], float]:
    """Its own training with the weight of one document changed: the mean loss of the queries."""
    asked = config(case, folder, queries, aggregation="mean")
    ordered = rows(TensorDataset(case.data.tensors[0][case.order]))
    ids = queries.tensors[0]

    def loss(document: int, change: float) -> float:
        trainer, state, model = prepare_trainer(
            asked, 0, asked.lr_schedule.get_schedule(case.size.steps)
        )
        stream = DataStream(ordered, case.size.slots)
        stream.weights.data[case.order.index(document)] += change
        with quiet():
            state = trainer.train(state, stream, inplace=True)
        with state.activate(model), torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    return loss
