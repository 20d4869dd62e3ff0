"""The queries of most tests: losses of four rows that the model was not trained on."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from tests.cases import rows

HELD_OUT = rows(seed=1, count=4)


def standard_losses(model: nn.Module) -> Tensor:
    """Return the losses of held-out rows 0 and 2, and the mean loss of all four, `[query]`."""
    losses = cross_entropy(model(HELD_OUT.tensors[0]), HELD_OUT.tensors[1], reduction="none")
    return torch.stack([losses[0], losses[2], losses.mean()])


def standard_queries() -> backtrail.Custom:
    """Return `standard_losses` as three queries."""
    return backtrail.Custom(standard_losses, labels=["row 0", "row 2", "mean"])
