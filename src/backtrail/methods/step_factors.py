"""The factors by which a step scales gradients: the learning rates of its parameter groups, the shares of its slots."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.run.run import Run
from backtrail.step.state import Setting


def rates(settings: Sequence[Mapping[str, Setting]]) -> tuple[float, ...]:
    """The learning rate of every parameter group as a step used it; negative where the loss was maximized."""
    signs = (-1.0 if setting.get("maximize") else 1.0 for setting in settings)
    return tuple(sign * float(setting["lr"]) for sign, setting in zip(signs, settings, strict=True))  # type: ignore[arg-type]


def shares(run: Run, index: int) -> Float[Tensor, " slot"]:
    """The factor c of every slot of a step; its batches are read only if they decide it."""
    if callable(run.task.reduce):
        return torch.cat(
            [micro_batch.share for micro_batch in run.transition(index).micro_batches()]
        )
    return torch.cat(
        run.task.shares((), [len(fed.samples) for fed in run.step(index).fed if fed.contributes])
    )
