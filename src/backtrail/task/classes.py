"""Scores of classes in what a model returns, and the classes that a batch gives.

One rule for all that compares classes: a single score per row, `[slot]` or `[slot, 1]`, is that of
class 1 against class 0, whose own score is 0.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from backtrail.errors import NoClasses
from backtrail.task.task import Batch, labels_of, logits_of


def class_scores(outputs: Any) -> Float[Tensor, "slot label"]:
    """Class scores in the output of `predict`; a single score is that of class 1 against class 0.

    >>> class_scores(torch.tensor([[2.0], [-1.0]])).tolist()
    [[0.0, 2.0], [0.0, -1.0]]

    Raises:
        NoClasses: There are none.
    """
    try:
        found = logits_of(outputs)
    except (KeyError, TypeError, IndexError, ValueError):
        raise NoClasses(f"predict returns a {type(outputs).__name__} without `logits`") from None
    if found.dim() == 1 or found.shape[1:] == (1,):
        single = found.flatten()
        found = torch.stack([torch.zeros_like(single), single], 1)
    if found.dim() != 2:
        raise NoClasses(f"predict returns shape {list(found.shape)}")
    return found


def class_labels(batch: Batch) -> Int64[Tensor, " slot"]:
    """The classes in a batch.

    Raises:
        NoClasses: There are none.
    """
    try:
        found = labels_of(batch)
    except (KeyError, TypeError, IndexError):
        raise NoClasses(f"a batch is a {type(batch).__name__} without labels") from None
    if not isinstance(found, Tensor):
        raise NoClasses(f"labels are a {type(found).__name__}, not a tensor of class numbers")
    flat = found.flatten() if found.shape[1:] == (1,) else found
    if flat.dim() != 1 or not _are_whole(flat):
        raise NoClasses(f"labels are {found.dtype} of shape {list(found.shape)}, not class numbers")
    return flat.long()


def labels_within(batch: Batch, scores: Float[Tensor, "slot label"]) -> Int64[Tensor, " slot"]:
    """The classes in a batch, each of which has a score.

    Raises:
        NoClasses: There are none, or one has no score.
    """
    given = class_labels(batch)
    classes = scores.shape[1]
    if len(given) != len(scores):
        raise NoClasses(f"there are {len(given)} labels for {len(scores)} rows of scores")
    try:
        lowest = int(given.min())
        highest = int(given.max())
    except RuntimeError:
        # Under `vmap` labels cannot be read. One without a score fails in the kernel that looks
        # its score up, and is named when the rows are then read one by one.
        return given
    if not 0 <= lowest <= highest < classes:
        raise NoClasses(f"labels go from {lowest} to {highest}, and there are {classes} classes")
    return given


def _are_whole(labels: Tensor) -> bool:
    if not labels.is_floating_point():
        return not labels.is_complex()
    try:
        return torch.equal(labels, labels.round())
    except RuntimeError:
        # Under `vmap` labels cannot be read; whoever uses it has read them before.
        return True
