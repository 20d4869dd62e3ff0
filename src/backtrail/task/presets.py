r"""Tasks that most trainings have: classes, and numbers.

Each also samples labels from the model, so that the mean of :math:`g g^\top` over such labels is
the Gauss-Newton matrix of a sample's loss (its true Fisher matrix, where the loss is a likelihood).
The same generator seed gives the same labels on every version of torch; see `sampling.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from backtrail.errors import SeveralLabels
from backtrail.sampling import sample_classes, sample_normal
from backtrail.task.clipping import ClipNorm, ClipValue
from backtrail.task.task import (
    Batch,
    Draw,
    Ids,
    Reduction,
    Rows,
    Task,
    default_predict,
    labels_of,
    logits_of,
)
from backtrail.tree import Tree

IGNORED = -100  # torch's and Hugging Face's mark of a label that does not count


def draw_classes(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Cross-entropy of a class sampled from the softmax of every row's logits."""
    logits = logits_of(outputs)
    labels = labels_of(batch)
    sampled = sample_classes(logits, generator)
    # Labels that are probabilities have no mark for rows that do not count.
    if not labels.is_floating_point():
        sampled = sampled.where(labels != IGNORED, labels)
    return nn.functional.cross_entropy(logits, sampled, reduction="none")


def draw_numbers(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    r"""Squared error of targets sampled around the outputs f, :math:`y \sim N(f, n/2)`.

    A row with n outputs has the loss :math:`|f - y|^2 / n`, whose gradient is
    :math:`2 (f - y) / n` and whose curvature is :math:`2/n`: with the variance n/2, the mean of the
    gradient's outer product is :math:`(4/n^2)(n/2) = 2/n`.
    """
    del batch
    found = logits_of(outputs)
    found = found.reshape(len(found), -1)
    count = found.shape[1]
    noise = sample_normal(found, generator)
    targets = found.detach() + noise * (count / 2) ** 0.5
    losses: Tensor = (found - targets).square().mean(1)
    return losses


def class_losses(outputs: Any, batch: Batch) -> Tensor:
    """Cross-entropy of every row.

    Raises:
        SeveralLabels: A row has several labels, such as one per pixel.
    """
    losses = nn.functional.cross_entropy(logits_of(outputs), labels_of(batch), reduction="none")
    if losses.dim() > 1:
        raise SeveralLabels(tuple(losses.shape))
    return losses


def squared_errors(outputs: Any, batch: Batch) -> Tensor:
    """Squared error of every row, averaged over its outputs."""
    found = logits_of(outputs)
    gaps: Tensor = found.reshape(len(found), -1) - labels_of(batch).reshape(len(found), -1)
    return gaps.square().mean(1)


def classification(
    model: nn.Module,
    data: Rows,
    *,
    predict: Callable[[nn.Module, Batch], Any] = default_predict,
    collate: Callable[[list[Any]], Batch] = default_collate,
    penalty: Callable[[Tree], Tensor] | None = None,
    reduce: Reduction = "mean",
    clip: ClipNorm | ClipValue | None = None,
    draw: Draw | None = draw_classes,
    ids: Ids | None = None,
) -> Task:
    """Task with the cross-entropy, in nats, between the model's logits and the class numbers.

    A batch is a pair (inputs, class numbers), or a mapping with `labels` as Hugging Face's models
    take it. A row has one label; for a label per pixel or token see `Raises`.

    >>> rows = [(torch.ones(2), 1)] * 4
    >>> task = classification(torch.nn.Linear(2, 3), rows)
    >>> losses, _ = task.losses(task.parameters(), {}, task.batch([0, 1]))
    >>> losses.shape
    torch.Size([2])

    Args:
        model: The model; see :class:`backtrail.Task`, as for all that follow.
        data: The training set, map-style.
        predict: `predict(model, batch) -> outputs`.
        collate: Turns a list of rows into a batch; must be the loader's.
        penalty: A function of the dict of parameters that the loop adds to its loss.
        reduce: "mean", "sum", or a function of a step's batches.
        clip: How the loop clips the gradient.
        draw: Samples labels from the model, for `DataValueEmbedding`.
        ids: Where a batch contains the ids of its samples.

    Raises:
        BadLoss: When the loss is first computed: a row has several labels, such as one per pixel.
    """
    return Task(
        model,
        data,
        class_losses,
        predict=predict,
        collate=collate,
        penalty=penalty,
        reduce=reduce,
        clip=clip,
        draw=draw,
        ids=ids,
    )


def regression(
    model: nn.Module,
    data: Rows,
    *,
    predict: Callable[[nn.Module, Batch], Any] = default_predict,
    collate: Callable[[list[Any]], Batch] = default_collate,
    penalty: Callable[[Tree], Tensor] | None = None,
    reduce: Reduction = "mean",
    clip: ClipNorm | ClipValue | None = None,
    draw: Draw | None = draw_numbers,
    ids: Ids | None = None,
) -> Task:
    """Task with the squared error between outputs and targets, averaged over the outputs of a row.

    A batch is a pair (inputs, targets), or a mapping with `labels` as Hugging Face's models take
    it.

    >>> rows = [(torch.ones(2), torch.zeros(1))] * 4
    >>> task = regression(torch.nn.Linear(2, 1), rows)
    >>> losses, _ = task.losses(task.parameters(), {}, task.batch([0, 1]))
    >>> losses.shape
    torch.Size([2])

    Args:
        model: The model; see :class:`backtrail.Task`, as for all that follow.
        data: The training set, map-style.
        predict: `predict(model, batch) -> outputs`.
        collate: Turns a list of rows into a batch; must be the loader's.
        penalty: A function of the dict of parameters that the loop adds to its loss.
        reduce: "mean", "sum", or a function of a step's batches.
        clip: How the loop clips the gradient.
        draw: Samples targets from the model, for `DataValueEmbedding`.
        ids: Where a batch contains the ids of its samples.
    """
    return Task(
        model,
        data,
        squared_errors,
        predict=predict,
        collate=collate,
        penalty=penalty,
        reduce=reduce,
        clip=clip,
        draw=draw,
        ids=ids,
    )
