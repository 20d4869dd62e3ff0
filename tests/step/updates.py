"""Optimizers some steps into a training of one small parameter."""

from typing import Any

import torch
from torch import Tensor, nn

from backtrail.step.optimizers import RULES
from backtrail.step.state import State, settings_of
from backtrail.step.update import Update, tensors_of

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.1, "centered": True, "momentum": 0.5},
    "ASGD": {"lr": 0.1, "t0": 1.0},
}


def started(kind: str, steps: int) -> tuple[Update, State, Tensor]:
    """Update, state and next gradient of an optimizer after some steps on random gradients."""
    draw = torch.Generator().manual_seed(5)
    parameter = nn.Parameter(torch.randn(6, generator=draw, dtype=torch.float64))
    optimizer_class: Any = RULES[kind].optimizer_class
    optimizer = optimizer_class([parameter], **SETTINGS.get(kind, {"lr": 0.1}))
    for _ in range(steps):
        parameter.grad = torch.randn(6, generator=draw, dtype=torch.float64)
        optimizer.step()
    grad = torch.randn(6, generator=draw, dtype=torch.float64)
    moments = {"w": tensors_of(optimizer.state[parameter])} if steps else {}
    state = State(
        {"w": parameter.detach().clone()},
        {},
        {n: {k: t.clone() for k, t in m.items()} for n, m in moments.items()},
    )
    return Update(kind, (("w",),), (settings_of(optimizer.param_groups[0]),)), state, grad
