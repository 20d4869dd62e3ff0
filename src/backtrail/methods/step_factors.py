r"""The factors by which a step scales gradients.

They are the learning rate :math:`\eta` of each parameter group, and the share c of each slot in the
step's loss.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.run.run import Run
from backtrail.step.state import Setting


def rates(settings: Sequence[Mapping[str, Setting]]) -> tuple[float, ...]:
    """Learning rate of every parameter group as a step used it; negative if it maximizes."""
    found = []
    for group in settings:
        rate = float(group["lr"])  # type: ignore[arg-type]
        # Ascent: a sample's step raises its loss.
        found.append(-rate if group.get("maximize") else rate)
    return tuple(found)


def shares(run: Run, index: int) -> Float[Tensor, " slot"]:
    """The factor c of every slot of a step; its batches are read only if c depends on them."""
    if callable(run.task.reduce):
        micro_batches = run.transition(index).micro_batches()
        return torch.cat([micro_batch.share for micro_batch in micro_batches])
    sizes = [len(fed.samples) for fed in run.step(index).fed if fed.contributes]
    return torch.cat(run.task.shares((), sizes))
