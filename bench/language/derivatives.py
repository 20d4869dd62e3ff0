"""Whether scores are derivatives: each library against small changes of its own training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import backtrail
from bench.language import magic
from bench.language.case import SMALL, Case, adamw, record, train

SIZES = tuple(
    2.0**-power for power in (10, 12, 14, 16, 18)
)  # exact in float32, in which bergson keeps its weights
QUERIES, NUDGED = 4, 8
Read = Callable[
    [int, float], float
]  # the mean loss of the queries, with the weight of a document moved by so much


@final
@dataclass(frozen=True, slots=True)
class Error:
    """Largest error relative to the largest derivative, and every document's own relative error."""

    overall: float
    shares: np.ndarray

    @classmethod
    def of(cls, found: np.ndarray, truth: np.ndarray) -> "Error":
        """Compare the scores of some documents with their derivatives."""
        gaps = np.abs(found - truth)
        return cls(float(gaps.max() / np.abs(truth).max()), gaps / np.abs(truth))


def errors(folder: Path, *, tied: bool) -> tuple[Error, Error]:
    """Errors of backtrail and of bergson on a small network in float64."""
    case = Case(SMALL, tied=tied, dtype=torch.float64)
    queries, nudged = case.held_out(QUERIES), case.order[:: len(case.order) // NUDGED]
    _, run = record(case, folder / "backtrail")
    ours = -backtrail.DIT().attribute(run, backtrail.Loss(queries, aggregate="mean")).total()[0, 0]
    theirs = magic.attribute(case, folder / "scores", queries, aggregation="mean").scores[0]
    ways = (
        (ours, nudging(case, queries)),
        (theirs, magic.retrained(case, folder / "again", queries)),
    )
    mine, peer = (
        Error.of(scores[nudged], np.array([slope(read, one) for one in nudged]))
        for scores, read in ways
    )
    return mine, peer


def nudging(case: Case, queries: TensorDataset) -> Read:
    """The loop in plain PyTorch."""

    def loss(document: int, change: float) -> float:
        task = case.task()
        place, seen = case.order.index(document), 0

        def weighted(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal seen
            weights = torch.ones(len(batch[0]), dtype=torch.float64)
            if 0 <= place - seen < len(weights):
                weights[place - seen] += change
            seen += len(weights)
            return weights * task.loss(outputs, batch)

        train(
            backtrail.Task(task.model, case.data, weighted, predict=task.predict),
            case.loader(),
            adamw(case, task.model),
        )
        with torch.no_grad():
            return float(
                task.loss(task.predict(task.model, queries.tensors), queries.tensors).mean()
            )

    return loss


def slope(read: Read, document: int) -> float:
    """A central difference, extrapolated where two neighbouring sizes agree best."""
    central = np.array(
        [(read(document, size) - read(document, -size)) / (2 * size) for size in SIZES]
    )
    richardson = (16 * central[1:] - central[:-1]) / 15
    return float(richardson[np.abs(np.diff(richardson)).argmin() + 1])
