"""A group of samples made lighter in a plain training: what the trained model becomes, and how fast."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from tests.cases import Case, rows, train

SIZES = (4e-3, 1e-3, 2.5e-4, 6.25e-5)  # each a quarter of the last


def trained_with(case: Case, group: Collection[int], weight: float, *, first: int = 0) -> nn.Module:
    """Plain PyTorch, with another weight for every visit of the group in the steps from `first` on."""

    def weights(step: int) -> Tensor:
        slots = [row for batch in case.groups[step] for row in batch]
        light = [weight if step >= first and row in group else 1.0 for row in slots]
        return torch.tensor(light, dtype=torch.float64)

    model = case.built()
    model.train()
    for _ in train(case, model, rows(), weights):
        pass
    return model


def floats(model: nn.Module) -> Tensor:
    """Every floating entry of the state_dict, one after the other."""
    return torch.cat(
        [t.detach().flatten() for t in model.state_dict().values() if t.is_floating_point()]
    )


def change_by_removal(case: Case, group: Collection[int]) -> Tensor:
    """Minus the derivative of every entry by the weight of the whole group.

    Central differences, of which neighbouring sizes give Richardson values; the pair that agrees
    best is taken.
    """
    central = torch.stack(
        [
            (
                floats(trained_with(case, group, 1 - size))
                - floats(trained_with(case, group, 1 + size))
            )
            / (2 * size)
            for size in SIZES
        ]
    )
    richardson = (16 * central[1:] - central[:-1]) / 15
    gaps = (richardson[1:] - richardson[:-1]).abs().amax(1)
    return richardson[int(gaps.argmin()) + 1]
