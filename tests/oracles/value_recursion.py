"""The recursion of Data Value Embedding as an explicit product of matrices, slot by slot."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backtrail.methods.dve.recursion import Visits


def factor(visits: Visits, damping: float = 0.0) -> Tensor:
    """Return the propagator of one step, `[rank, rank]`.

    diag(rho) - H (I + damping * H)^-1 with H = sum over rows of c * x g^T, where g is a gradient
    of the curvature, x what the update makes of it, and rho what weight decay leaves.
    """
    identity = torch.eye(len(visits.decay), dtype=torch.float64)
    curvature = torch.zeros_like(identity)
    for c, x, g in zip(visits.share, visits.fisher_moved, visits.fisher, strict=True):
        curvature += float(c) * torch.outer(x.double(), g.double())
    damped = curvature @ torch.linalg.inv(identity + damping * curvature)
    return torch.diag(visits.decay.double()) - damped


def products(steps: Sequence[Visits], damping: float = 0.0) -> list[Tensor]:
    """Return P_t before every step t, and after the last: the product of the factors from t on."""
    found = []
    for first in range(len(steps) + 1):
        product = torch.eye(len(steps[0].decay), dtype=torch.float64)
        for visits in steps[first:]:
            product = factor(visits, damping) @ product
        found.append(product)
    return found


def value_embeddings(steps: Sequence[Visits], damping: float = 0.0) -> list[Tensor]:
    """Return the embeddings of every step, `[slot, rank]`: row b is c_b * P_{t+1} x_b."""
    after = products(steps, damping)[1:]
    embeddings = []
    for visits, product in zip(steps, after, strict=True):
        of_step = []
        for c, x in zip(visits.share, visits.moved, strict=True):
            of_step.append(float(c) * (product @ x.double()))
        embeddings.append(torch.stack(of_step))
    return embeddings
