"""The recursion of Data Value Embedding as an explicit product of matrices, one slot after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backtrail.methods.dve.recursion import Visits


def factor(visits: Visits, damping: float = 0.0) -> Tensor:
    """What one step makes of a change of the state before it."""
    one = torch.eye(len(visits.decay), dtype=torch.float64)
    curved = torch.zeros_like(one)
    for c, moved, gradient in zip(visits.share, visits.fisher_moved, visits.fisher, strict=True):
        curved += float(c) * torch.outer(moved.double(), gradient.double())
    return torch.diag(visits.decay.double()) - curved @ torch.linalg.inv(one + damping * curved)


def products(steps: Sequence[Visits], damping: float = 0.0) -> list[Tensor]:
    """P behind every step, and before the first: products of the factors of all later steps."""
    found = []
    for first in range(len(steps) + 1):
        product = torch.eye(len(steps[0].decay), dtype=torch.float64)
        for visits in steps[first:]:
            product = factor(visits, damping) @ product
        found.append(product)
    return found


def value_embeddings(steps: Sequence[Visits], damping: float = 0.0) -> list[Tensor]:
    """The embeddings of every step, `[slot, rank]`."""
    behind = products(steps, damping)[1:]
    return [
        torch.stack(
            [
                float(c) * (product @ row.double())
                for c, row in zip(visits.share, visits.moved, strict=True)
            ]
        )
        for visits, product in zip(steps, behind, strict=True)
    ]
