"""The loss of one training step, also as functions of one flat vector of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import backtrail
from backtrail.step.state import BatchRecord, Step
from backtrail.step.step import MicroBatch, Transition
from backtrail.step.update import Update
from backtrail.tree import Tree
from tests.cases import rows

SLOTS = (0, 1, 2, 4)


@dataclass(frozen=True)
class Problem:
    """One step's loss, and the same as functions of one flat vector."""

    micro_batch: MicroBatch
    params: Tree
    buffers: Tree

    @property
    def start(self) -> Tensor:
        """The parameters as a vector."""
        return torch.cat([tensor.flatten() for tensor in self.params.values()])

    def tree(self, vector: Tensor) -> Tree:
        """A vector in the shapes of the parameters."""
        parts = torch.split(vector, [tensor.numel() for tensor in self.params.values()])
        return {
            name: part.view_as(t)
            for part, (name, t) in zip(parts, self.params.items(), strict=True)
        }

    def outputs(self, vector: Tensor) -> Tensor:
        """What the model returns, `[slot, class]`."""
        found: Tensor = self.micro_batch.transition.task.outputs(
            self.tree(vector), self.buffers, self.micro_batch.batch
        )[0]
        return found

    def losses(self, vector: Tensor) -> Tensor:
        """Losses `[slot]`."""
        return self.micro_batch.transition.task.losses_of(
            self.outputs(vector), self.micro_batch.batch
        )

    def penalty(self, vector: Tensor) -> Tensor:
        """The regulariser."""
        penalty = self.micro_batch.transition.task.penalty
        return penalty(self.tree(vector)) if penalty else vector.new_zeros(())

    def total(self, vector: Tensor) -> Tensor:
        """The step's loss."""
        return self.losses(vector).mean() + self.penalty(vector)

    def statistics(self, vector: Tensor) -> Tensor:
        """Running statistics after the forward pass, as a vector."""
        task = self.micro_batch.transition.task
        after = task.outputs(self.tree(vector), self.buffers, self.micro_batch.batch)[1]
        return torch.cat([after[name] for name in task.running])


def problem(
    build: Callable[[], nn.Module], *, evaluating: bool = False, penalty: Any = None
) -> Problem:
    """A step on four samples."""
    torch.manual_seed(3)
    model = build().double()
    task = backtrail.classification(model, rows(), penalty=penalty)
    names = tuple(task.parameters())
    modes = tuple(name for name, _ in model.named_modules()) if evaluating else ()
    step = Step(
        index=0,
        fed=(BatchRecord(SLOTS, 0, ""),),
        settings=({"lr": 0.1},),
        norm=0.0,
        evaluating=modes,
    )
    transition = Transition(
        task, Update("SGD", (names,), ({"lr": 0.1},)), step, (task.batch(SLOTS),)
    )
    task.binding.set_modes(modes)
    params, buffers = (
        {n: t.clone() for n, t in tree.items()} for tree in (task.parameters(), task.buffers())
    )
    buffers = {
        name: torch.rand_like(b) + 0.5 if b.is_floating_point() else b
        for name, b in buffers.items()
    }
    return Problem(transition.micro_batches()[0], params, buffers)
