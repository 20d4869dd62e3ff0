"""dattri-llm's AdamW influence by its public interface: captured beside the loop, then scored."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from dattri_llm import (
    REGISTER_ALL,
    AdamWInfluenceAttributor,
    AttributionArguments,
    GradientStorageManager,
    HookManager,
    HookManagerCallback,
    HookManagerConfig,
    OffloadCallback,
    OptimizerStateCallback,
    hash_batch,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import backtrail
from bench.language.case import Case, adamw, train


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds of training and of scoring, and the scores `[query, document]`, summed over steps."""

    forward: float
    scoring: float
    scores: np.ndarray


def attribute(case: Case, folder: Path, queries: TensorDataset) -> Answer:
    """Train with its hooks, take the queries' gradients, and score every document."""
    task = replace(case.task(), predict=placed)
    begun = time.perf_counter()
    moments = captured(case, task, folder / "train")
    trained = time.perf_counter()
    with capturing(task, folder / "queries"):
        batch = queries.tensors
        task.loss(placed(task.model, batch), batch).mean().backward()
    attributor = AdamWInfluenceAttributor(AttributionArguments(output_dir=str(folder / "scores")))
    found = attributor.attribute_from_cache(
        str(folder / "train"),
        str(folder / "queries"),
        dynamics=moments.dynamics(),
        propagation="test",
    )
    scores = found.query(named(case.data), named(queries)).T.numpy()
    return Answer(trained - begun, time.perf_counter() - trained, scores)


def captured(case: Case, task: backtrail.Task, folder: Path) -> OptimizerStateCallback:
    """Train with hooks on every layer; the moments before and after every update."""
    rule = adamw(case, task.model)
    moments = OptimizerStateCallback(task.model, rule[0])
    with capturing(task, folder, moments):
        train(task, case.loader(), rule, after=moments.record_post)
    return moments


def capturing(
    task: backtrail.Task, folder: Path, *others: HookManagerCallback
) -> AbstractContextManager[HookManager]:
    """Write the gradient of every document, step by step."""
    writing = OffloadCallback(1, GradientStorageManager(str(folder)), recording_type="per_batch")
    every = HookManagerConfig(linear_io=REGISTER_ALL)
    hooks = HookManager(task.model, every, [writing, *others], sample_hash_fields=["input_ids"])
    return hooks.collect(deregister_on_exit=True)


def named(data: TensorDataset) -> list[str]:
    """Its names of documents: hashes of their words."""
    return hash_batch({"input_ids": data.tensors[0]}, len(data))


def placed(model: nn.Module, batch: Any) -> Tensor:
    """The outputs, with positions for each document, since the hooks want a gradient for each."""
    ids = batch[0]
    found: Tensor = model(
        input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand_as(ids)
    ).logits
    return found
