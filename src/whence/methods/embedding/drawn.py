"""Gradients with labels drawn from the model, for some of a step's samples.

A Fisher matrix is a mean, which a few samples estimate. They have a pass of their own: it costs what it costs them, and
needs nothing of the graph of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from whence.methods.embedding.projection import seed_of
from whence.replay.capture import Watched, watched_alone
from whence.replay.rows import Asked, Loss, Rows
from whence.replay.transition import Piece, Transition
from whence.task import Batch, Task
from whence.tree import Tree


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
        for piece, size in enumerate(transition.sizes):
            slots[piece] = some[(some >= first) & (some < first + size)] - first
            first += size
        return Chosen(slots, total / max(1, len(some)))

    def loss(self, step: int, piece: int) -> Loss:
        """The losses with drawn labels."""
        seed, draw = seed_of(self.seed, step, piece), self.task.draw
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

    def share(self, piece: Piece) -> Tensor:
        """The factors of a micro-batch's chosen slots in the mean over all."""
        return piece.share[self.slots[piece.index]] * self.times

    def rows(
        self, piece: Piece, params: Tree, buffers: Tree, *, asked: Mapping[str, Asked], seen: Watched | None = None
    ) -> dict[str, Tensor]:
        """Their small gradients in a micro-batch.

        Args:
            piece: the micro-batch.
            params: where the gradients are taken.
            buffers: before the forward pass.
            asked: of losses with drawn labels, by name.
            seen: the pass over all of it, if there was one; needed only where a batch's statistics are constants.

        Raises:
            NotCut: its batch is not made of rows.
        """
        slots, losses = self.slots[piece.index], list(asked.values())
        if not len(slots):
            return {}
        if seen is not None and seen.froze:
            found: Rows = tuple(rows[slots] for rows in seen.rows(losses))
        else:
            found = watched_alone(piece.cut(slots), params, buffers).rows(losses)
        return dict(zip(asked, found, strict=True))
