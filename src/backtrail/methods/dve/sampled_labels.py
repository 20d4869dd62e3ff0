"""Gradients with labels drawn from the model, for some of a step's samples.

A Fisher matrix is a mean, which a few samples estimate. They have a pass of their own: it costs
what it costs them, and needs nothing of the graph of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from backtrail.methods.dve.projection import seed_of
from backtrail.persample.gradients import Watched, watched_alone
from backtrail.persample.rules import Asked, Loss, Rows
from backtrail.step.step import MicroBatch, Transition
from backtrail.task.task import Batch, Task
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Drawn:
    """Whose labels are drawn, and what they are: always the same of a step.

    Attributes:
        task: of the training.
        portion: of a step's samples.
        seed: of both draws.
    """

    task: Task
    portion: float
    seed: int

    def count(self, slots: int) -> int:
        """How many of so many, at least one."""
        return max(1, round(self.portion * slots))

    def chosen(self, transition: Transition) -> "Chosen":
        """Slots of a step."""
        total = sum(transition.sizes)
        draw = torch.Generator().manual_seed(seed_of(self.seed, transition.step.index))
        some = torch.randperm(total, generator=draw)[: self.count(total)].sort()[0]
        slots, first = {}, 0
        for micro_batch, size in enumerate(transition.sizes):
            slots[micro_batch] = some[(some >= first) & (some < first + size)] - first
            first += size
        return Chosen(slots, total / max(1, len(some)))

    def loss(self, step: int, micro_batch: int) -> Loss:
        """The losses with drawn labels."""
        seed, draw = seed_of(self.seed, step, micro_batch), self.task.draw
        assert draw is not None

        def losses(outputs: Any, batch: Batch) -> Tensor:
            return draw(outputs, batch, torch.Generator(self.task.device).manual_seed(seed))

        return losses


@final
@dataclass(frozen=True, slots=True)
class Chosen:
    """Some slots of a step.

    Attributes:
        slots: by micro-batch.
        times: how many slots each of them stands for.
    """

    slots: Mapping[int, Tensor]
    times: float

    def share(self, micro_batch: MicroBatch) -> Tensor:
        """The factors of a micro-batch's chosen slots in the mean over all."""
        return micro_batch.share[self.slots[micro_batch.index]] * self.times

    def rows(
        self,
        micro_batch: MicroBatch,
        params: Tree,
        buffers: Tree,
        *,
        asked: Mapping[str, Asked],
        seen: Watched | None = None,
    ) -> dict[str, Tensor]:
        """Their small gradients in a micro-batch.

        Args:
            micro_batch: the micro-batch.
            params: where the gradients are taken.
            buffers: before the forward pass.
            asked: of losses with drawn labels, by name.
            seen: the pass over all of it, if there was one; needed only where a batch's statistics
                are constants.

        Raises:
            NotCut: its batch is not made of rows.
        """
        slots, losses = self.slots[micro_batch.index], list(asked.values())
        if not len(slots):
            return {}
        if seen is not None and seen.froze_statistics:
            found: Rows = tuple(rows[slots] for rows in seen.rows(losses))
        else:
            found = watched_alone(micro_batch.cut(slots), params, buffers).rows(losses)
        return dict(zip(asked, found, strict=True))
