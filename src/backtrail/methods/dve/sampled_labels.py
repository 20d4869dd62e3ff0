"""Gradients with labels sampled from the model, for some of a step's samples.

The true Fisher matrix is a mean over samples, which a random part of them estimates. That part has
a forward and backward pass of its own, whose cost is in proportion to its size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from backtrail.methods.dve.projection import seed_of
from backtrail.persample.gradients import TracedPass, trace_forward
from backtrail.persample.rules import Loss, Request, Rows
from backtrail.sampling import sample_subset
from backtrail.step.step import MicroBatch, Transition
from backtrail.task.task import Batch, Task
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Drawn:
    """Which samples have labels sampled, and which labels.

    Both depend on the seed and the step alone, so a step that is replayed again, by another process
    or another version of torch, gives the same.

    Attributes:
        task: of the training; it samples the labels.
        portion: share of a step's samples, above 0 and at most 1.
        seed: of the choice and of the labels.
    """

    task: Task
    portion: float
    seed: int

    def count(self, slots: int) -> int:
        """Number of chosen samples among `slots`, at least one."""
        return max(1, round(self.portion * slots))

    def chosen(self, transition: Transition) -> "Chosen":
        """The chosen slots of a step, a random subset of all its micro-batches' slots."""
        total = sum(transition.slot_counts)
        seed = seed_of(self.seed, transition.step.index)
        # A step without any samples has none to choose.
        count = min(self.count(total), total)
        chosen = sample_subset(total, count, seed)
        slots = {}
        first = 0
        for micro_batch, size in enumerate(transition.slot_counts):
            inside = (chosen >= first) & (chosen < first + size)
            slots[micro_batch] = chosen[inside] - first
            first += size
        return Chosen(slots, total / max(1, count))

    def loss(self, step: int, micro_batch: int) -> Loss:
        """The loss function of a micro-batch with sampled labels."""
        seed = seed_of(self.seed, step, micro_batch)
        draw = self.task.draw
        assert draw is not None

        def losses(outputs: Any, batch: Batch) -> Tensor:
            # Seeded anew at every call: a pass that is repeated has the same labels.
            generator = torch.Generator(self.task.device).manual_seed(seed)
            return draw(outputs, batch, generator)

        return losses


@final
@dataclass(frozen=True, slots=True)
class Chosen:
    """Some slots of a step.

    Attributes:
        slots: their places in each micro-batch, by its index.
        times: the number of slots that each of them represents.
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
        asked: Mapping[str, Request],
        seen: TracedPass | None = None,
    ) -> dict[str, Tensor]:
        """Projected gradients of the chosen slots of a micro-batch.

        Args:
            micro_batch: the micro-batch.
            params: parameters at which the gradients are taken.
            buffers: before the forward pass.
            asked: losses with sampled labels and their projections, by name.
            seen: the pass over the whole micro-batch, if there was one; needed only where a batch's
                statistics are constants.

        Raises:
            NotCut: its batch is not made of rows.
        """
        slots = self.slots[micro_batch.index]
        losses = list(asked.values())
        if not len(slots):
            return {}
        # Where BatchNorm's statistics are constants, those of the whole micro-batch count, and a
        # pass over some of its rows would compute others.
        if seen is not None and seen.froze_statistics:
            found: Rows = tuple(rows[slots] for rows in seen.rows(losses))
        else:
            found = trace_forward(micro_batch.select_slots(slots), params, buffers).rows(losses)
        return dict(zip(asked, found, strict=True))
