"""Language models: the loss of a row of tokens, and how a loop averages over tokens.

Decisions: two kinds of batch, told apart by their type. A pair (tokens, targets) has the next
tokens as its targets. A mapping is what Hugging Face's models take: its `labels` are the tokens
themselves, and the shift by one place happens here, as it does in those models. In both, -100 marks
a target that does not count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from backtrail import arguments
from backtrail.errors import NoLabels
from backtrail.sampling import sample_classes
from backtrail.task.clipping import ClipNorm, ClipValue
from backtrail.task.presets import IGNORED
from backtrail.task.task import (
    Batch,
    Draw,
    Ids,
    Reduction,
    Rows,
    Task,
    default_predict,
    logits_of,
)
from backtrail.tree import Tree

WEIGHTS = "token_weights"


@final
@dataclass(frozen=True, slots=True)
class TokenMean:
    r"""A `reduce` for loops that average over tokens, so that long rows count more than short ones.

    With :math:`n_b` the number of tokens of row b that count (or the sum of their weights),

    .. math:: c_b = n_b / \sum_{b'} n_{b'}

    `model(**batch).loss` of Hugging Face's models is averaged this way, and so is torch's own
    `cross_entropy`.

    >>> batch = torch.zeros(2, 3), torch.tensor([[5, 6, 7], [5, -100, -100]])
    >>> TokenMean()([batch]).tolist()
    [0.75, 0.25]

    Args:
        over: With gradient accumulation, the tokens that a mean is over: those of the whole "step",
            or those of each "batch", whose means are then averaged.
    """

    over: Literal["step", "batch"] = "step"

    def __post_init__(self) -> None:
        """Check the argument.

        Raises:
            BadSetting: It has an invalid value.
        """
        arguments.choice("over", self.over, ("step", "batch"))

    def __call__(self, batches: Sequence[Batch]) -> Float[Tensor, " slot"]:
        """The share c of every slot in one step's loss."""
        counts: list[Tensor] = []
        for batch in batches:
            _, weights = targets_of(batch)
            counts.append(weights.double().sum(1))
        if self.over == "batch":
            return torch.cat([_shares(of_batch) / len(counts) for of_batch in counts])
        return _shares(torch.cat(counts))


def targets_of(batch: Batch) -> tuple[Int[Tensor, "slot place"], Tensor]:
    """Find the target token at every place of a batch, and the weight of its loss.

    Raises:
        NoLabels: the batch has none.
    """
    if not isinstance(batch, Mapping):
        return batch[1], batch[1] != IGNORED
    if "labels" not in batch:
        raise NoLabels(list(batch))
    # The logits of a place predict the token at the next one.
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    if WEIGHTS not in batch:
        return targets, counted
    return targets, counted * batch[WEIGHTS][:, 1:]


def _shares(counts: Tensor) -> Tensor:
    # Where no token counts, torch's mean is NaN and its gradient zero: every share is 0.
    total = counts.sum()
    return counts / total.where(total != 0, 1)


def _loss(outputs: Any, batch: Batch) -> Tensor:
    targets, weights = targets_of(batch)
    # In a mapping the last place has no target.
    logits = logits_of(outputs)[:, : targets.shape[1]]
    nats = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    total = weights.sum(1)
    # A row in which no token counts has the loss 0.
    return (nats.view(targets.shape) * weights).sum(1) / total.where(total != 0, 1)


def draw_tokens(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    r"""Cross-entropy of a token sampled at every place, weighted by the root of the place's share.

    With :math:`s_i = v_i / \sum_j v_j` the loss is :math:`\sum_i \sqrt{s_i}\,(-\log p_i)`. Tokens
    of different places are independent, so the mean of the gradient's outer product has
    :math:`(\sqrt{s_i})^2 = s_i` times the curvature of a place, as the row's loss has; with the
    share itself instead of its root it would have :math:`s_i^2`.
    """
    targets, weights = targets_of(batch)
    logits = logits_of(outputs)[:, : targets.shape[1]].flatten(0, 1)
    sampled = sample_classes(logits, generator)
    nats = cross_entropy(logits, sampled, reduction="none").view(targets.shape)
    total = weights.sum(1, keepdim=True)
    share = weights / total.where(total != 0, 1)
    return (nats * share.sqrt()).sum(1)


def logits_without_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the model, which is given a mapping without labels and weights."""
    if isinstance(batch, Mapping):
        batch = {name: value for name, value in batch.items() if name not in {"labels", WEIGHTS}}
    return logits_of(default_predict(model, batch))


def language_model(
    model: nn.Module,
    data: Rows,
    *,
    predict: Callable[[nn.Module, Batch], Any] = logits_without_labels,
    collate: Callable[[list[Any]], Batch] = default_collate,
    penalty: Callable[[Tree], Tensor] | None = None,
    reduce: Reduction = "mean",
    clip: ClipNorm | ClipValue | None = None,
    draw: Draw | None = draw_tokens,
    ids: Ids | None = None,
) -> Task:
    r"""Task with the cross-entropy of the next token, in nats, averaged over the tokens of a row.

    .. math:: \ell_b = \sum_i v_{b,i} \left(-\log p_{b,i}\right) / \sum_i v_{b,i}

    A batch is a pair (tokens, targets), or a mapping as Hugging Face's models take it: `input_ids`,
    `attention_mask` and whatever else the model wants, `labels`, which are shifted by one place
    here, and optionally `token_weights`, the v of every label. Without them v is 1, and 0 where the
    label is -100. Labels and weights are kept from the model, which would compute a loss of its
    own.

    The loop averages these losses over the rows (`reduce="mean"`, the default) or over all tokens
    (`reduce=backtrail.TokenMean()`, which is what `model(**batch).loss` does).

    >>> rows = [{"input_ids": torch.arange(3), "labels": torch.tensor([0, 1, -100])}] * 2
    >>> task = language_model(
    ...     nn.Embedding(5, 5), rows, predict=lambda model, batch: model(batch["input_ids"])
    ... )
    >>> task.losses(task.parameters(), {}, task.batch([0, 1]))[0].shape
    torch.Size([2])

    Args:
        model: The model; see :class:`backtrail.Task`, as for all that follow.
        data: The training set, map-style.
        predict: `predict(model, batch) -> outputs`.
        collate: Turns a list of rows into a batch; must be the loader's.
        penalty: A function of the dict of parameters that the loop adds to its loss.
        reduce: "mean", "sum", or a function of a step's batches.
        clip: How the loop clips the gradient.
        draw: Samples tokens from the model, for `DataValueEmbedding`.
        ids: Where a batch contains the ids of its samples.
    """
    return Task(
        model,
        data,
        _loss,
        predict=predict,
        collate=collate,
        penalty=penalty,
        reduce=reduce,
        clip=clip,
        draw=draw,
        ids=ids,
    )
