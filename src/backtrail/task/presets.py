r"""Tasks that most trainings have: classes, and numbers.

Each also says how labels are drawn from the model, so that the mean of :math:`g g^\top` over the
draws is the Gauss-Newton matrix of a sample's loss (its true Fisher matrix, where the loss is a
likelihood).
"""

from typing import Any

import torch
from torch import Tensor, nn

from backtrail.task.task import Batch, Rows, Task, labels_of, logits_of

IGNORED = -100  # torch's and Hugging Face's mark of a label that does not count


def classification(model: nn.Module, data: Rows, **options: Any) -> Task:
    """Cross-entropy, in nats, between the model's logits and the class numbers.

    A batch is a pair (inputs, class numbers), or a mapping with `labels` as Hugging Face's models
    take it.
    """

    def loss(outputs: Any, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(logits_of(outputs), labels_of(batch), reduction="none")

    return Task(model, data, loss, **{"draw": _draw_classes} | options)


def regression(model: nn.Module, data: Rows, **options: Any) -> Task:
    """Squared error between the model's outputs and the targets, averaged over the outputs of a row.

    A batch is a pair (inputs, targets), or a mapping with `labels` as Hugging Face's models take
    it.
    """

    def loss(outputs: Any, batch: Batch) -> Tensor:
        found = logits_of(outputs)
        gaps: Tensor = found.reshape(len(found), -1) - labels_of(batch).reshape(len(found), -1)
        return gaps.square().mean(1)

    return Task(model, data, loss, **{"draw": _draw_numbers} | options)


def drawn_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A class for every row of logits, with the probabilities that they give it."""
    chances = logits.detach().softmax(1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def _draw_classes(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    logits, labels = logits_of(outputs), labels_of(batch)
    drawn = drawn_classes(logits, generator)
    if not labels.is_floating_point():
        drawn = drawn.where(labels != IGNORED, labels)
    return nn.functional.cross_entropy(logits, drawn, reduction="none")


def _draw_numbers(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Targets around the outputs, with half as much variance as a row has outputs: 2 / n is the loss's curvature."""
    del batch
    found = logits_of(outputs)
    found = found.reshape(len(found), -1)
    count = found.shape[1]
    noise = torch.randn(found.shape, generator=generator, dtype=found.dtype, device=found.device)
    targets = found.detach() + noise * (count / 2) ** 0.5
    losses: Tensor = (found - targets).square().mean(1)
    return losses
