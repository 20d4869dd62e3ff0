"""Trainings in which a group of samples weighs less, and the derivative by that weight."""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from tests.cases import Case, rows, train

# Half widths h of the differences, each a quarter of the one before.
SIZES = (4e-3, 1e-3, 2.5e-4, 6.25e-5)


def trained_with(case: Case, group: Collection[int], weight: float, *, first: int = 0) -> nn.Module:
    """Train a case in plain PyTorch, with a weight of the group's samples from step `first` on."""

    def weights(step: int) -> Tensor:
        found = []
        for batch in case.groups[step]:
            for row in batch:
                is_changed = step >= first and row in group
                found.append(weight if is_changed else 1.0)
        return torch.tensor(found, dtype=torch.float64)

    model = case.built()
    model.train()
    for _ in train(case, model, rows(), weights):
        pass
    return model


def floats(model: nn.Module) -> Tensor:
    """Return all floating-point entries of a model's state_dict as one vector."""
    entries = []
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            entries.append(tensor.detach().flatten())
    return torch.cat(entries)


def change_by_removal(case: Case, group: Collection[int]) -> Tensor:
    """Return - d state / d w, the derivative of every entry by the weight w of the whole group.

    Central differences D(h), of which neighbouring sizes give Richardson's value
    (16 D(h/4) - D(h)) / 15. We take the value that differs least from the one before, in its worst
    entry: with a larger h truncation dominates, with a smaller one rounding.
    """
    central = []
    for size in SIZES:
        lighter = floats(trained_with(case, group, 1 - size))
        heavier = floats(trained_with(case, group, 1 + size))
        central.append((lighter - heavier) / (2 * size))
    richardson = []
    for coarse, fine in itertools.pairwise(central):
        richardson.append((16 * fine - coarse) / 15)
    gaps = []
    for before, value in itertools.pairwise(richardson):
        gaps.append(float((value - before).abs().max()))
    return richardson[gaps.index(min(gaps)) + 1]
