"""Which watched batches the coming step consumes: a hook on every parameter sees each backward pass.

Decisions: a backward pass on fresh gradients opens a new list of batches, any other joins it; so
accumulation, `zero_grad` before or after, and steps that a GradScaler skips all come out right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backtrail.errors import OtherSlots, SparseGradient, StaleGradient, UnwatchedStep
from backtrail.record.listeners import Listening
from backtrail.record.randomness import generators
from backtrail.run.tensors import copied, digest
from backtrail.step.state import BatchRecord
from backtrail.task.task import Batch, Task, size_of
from backtrail.task.torch_compile import buffers, modules
from backtrail.tree import Tree, plain

SMALL = 2**16  # entries up to which a buffer is copied whether it changed or not


@dataclass(frozen=True, slots=True)
class LiveBatch:
    """A batch as it left the loader, and the world at that moment.

    Attributes:
        samples: row numbers, in slot order.
        epoch: which pass over the loader it came from.
        digest: content hash.
        content: a copy, where the rows cannot be read again.
        random: states of the generators; none once it is known that the forward pass drew nothing.
        buffers: the model's buffers.
        passes: how often batch norm had moved its statistics.
        contributes: whether the step consumes its gradient; if not, it only moved those statistics.
        heard: what else listens to the passes on it.
    """

    samples: tuple[int, ...]
    epoch: int
    digest: str
    content: Batch | None
    random: dict[str, bytes]
    buffers: Tree
    passes: int
    contributes: bool = True
    heard: Any = None

    def noted(self) -> BatchRecord:
        """What the log says of it."""
        return BatchRecord(
            self.samples,
            self.epoch,
            self.digest,
            self.random or None,
            self.content is not None,
            self.contributes,
        )


@final
class Feeding:
    """Listens to the backward passes of a training.

    Attributes:
        step: number of the coming step.
        consumed: batches whose gradients the coming step consumes, in order.
        evaluating: modules that were in eval mode at the last backward pass.
        autocast: the precision that the model was last called under; empty without autocast.
        beside: what else listens.
    """

    def __init__(self, task: Task, trained: Mapping[str, nn.Parameter]) -> None:
        self._task, self._trained = task, trained
        self.beside: Listening | None = None
        self._hooks: dict[str, RemovableHandle] = {}
        self._copies: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._now: LiveBatch | None = None
        self.step = 0
        self.consumed: list[LiveBatch] = []
        self.evaluating: tuple[str, ...] = ()
        self.autocast = ""

    def listen(self) -> None:
        """Hook every parameter that receives gradients by now, and every module that has parameters of its own."""
        if not self._hooks:
            self._listen_to_calls()
        for name, parameter in self._trained.items():
            if parameter.requires_grad and name not in self._hooks:
                hook = partial(self._on_gradient, name)
                self._hooks[name] = parameter.register_hook(hook)  # type: ignore[no-untyped-call]

    def _listen_to_calls(self) -> None:
        kind = self._task.device.type
        self._task.binding  # noqa: B018 - the skeleton is copied before there are hooks that it would copy

        def note(module: nn.Module, args: object) -> None:
            del module, args
            self.autocast = (
                str(torch.get_autocast_dtype(kind))[6:] if torch.is_autocast_enabled(kind) else ""
            )

        for name, module in modules(self._task.model).items():
            if any(True for _ in module.parameters(recurse=False)):
                self._hooks[f"call:{name}"] = module.register_forward_pre_hook(note)

    def stop(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks.values():
            hook.remove()

    def yielded(self, samples: tuple[int, ...], batch: Batch, *, epoch: int, keep: bool) -> None:
        """Note the batch that is about to be handed to the loop."""
        self.listen()
        self.let_pass()
        batch = plain(batch)
        world = generators(self._task.device), self.buffers(), self._passes()
        content = copied(batch) if keep else None
        self._now = LiveBatch(
            samples, epoch, digest(batch), content, *world, heard=self._hear(batch)
        )

    def let_pass(self) -> None:
        """A batch that moved batch norm and led to no gradient still belongs to the history of the statistics."""
        now = self._now
        if (
            now is None
            or self._passes() == now.passes
            or (self.consumed and self.consumed[-1] is now)
        ):
            return
        self.consumed.append(replace(now, contributes=False))

    def replaced(self, batch: Batch) -> None:
        """Note that the model is fed this in place of the batch last yielded.

        Raises:
            UnwatchedStep: no batch was yielded yet.
            OtherSlots: it has another number of rows.
        """
        if self._now is None:
            raise UnwatchedStep(self.step)
        batch = plain(batch)
        if size_of(batch) != len(self._now.samples):
            raise OtherSlots(size_of(batch), len(self._now.samples))
        random = generators(self._task.device)
        fed = {"content": copied(batch), "digest": digest(batch), "random": random}
        self._now = replace(self._now, **fed, heard=self._hear(batch))

    def stepped(self) -> None:
        """Go on to the next step; another one on the same batch has a forward pass of its own, from here."""
        random, last = generators(self._task.device), self.consumed[-1]
        self.consumed = []
        self.step += 1
        heard = last.heard and self._hear(last.heard.batch)
        self._now = replace(
            last, random=random, buffers=self.buffers(), passes=self._passes(), heard=heard
        )
        self.listen()

    def _hear(self, batch: Batch) -> Any:
        return self.beside and self.beside.listen(batch, self.step, len(self.consumed))

    def left(self) -> Tree:
        """The model's buffers as the last step left them, whatever was fed since and led to no step."""
        self.let_pass()
        return self.consumed[0].buffers if self.consumed else self.buffers()

    def buffers(self) -> Tree:
        """The model's buffers as they are now, copied; large ones only where they changed."""
        return {
            name: self._copy(name, buffer) for name, buffer in buffers(self._task.model).items()
        }

    def _copy(self, name: str, buffer: Tensor) -> Tensor:
        # torch's batch norm moves its statistics without counting a version, but they are small.
        if buffer.numel() <= SMALL:
            return buffer.detach().clone()
        seen, version, copy = self._copies.get(name, (None, -1, buffer))
        if seen is not buffer or version != buffer._version:
            copy = buffer.detach().clone()
            self._copies[name] = (buffer, buffer._version, copy)
        return copy

    def _on_gradient(self, name: str, grad: Tensor) -> None:
        """The first gradient of a backward pass: its batch joins the step, or opens one if gradients are fresh.

        Raises:
            SparseGradient: it is not a dense tensor.
            StaleGradient: gradients of the step before are still there.
        """
        if grad.layout != torch.strided:
            raise SparseGradient(name, self.step)
        now = self._now
        if now is None or (self.consumed and self.consumed[-1] is now):
            return
        if generators(self._task.device) == now.random:
            now = self._now = replace(now, random={})
        self.evaluating = tuple(
            name for name, module in modules(self._task.model).items() if not module.training
        )
        fresh = not any(p.grad is not None and bool(p.grad.any()) for p in self._trained.values())
        if not fresh and not any(y.contributes for y in self.consumed):
            raise StaleGradient(self.step)
        self.consumed = [*(self._passed(now) if fresh else self.consumed), now]

    def _passed(self, now: LiveBatch) -> list[LiveBatch]:
        """Batches whose gradients were thrown away, as far as their forward passes moved batch norm's statistics."""
        following = [*self.consumed[1:], now]
        moved = (a for a, b in zip(self.consumed, following, strict=False) if a.passes != b.passes)
        return [replace(y, contributes=False) for y in moved]

    def _passes(self) -> int:
        """Layers that keep running statistics count their passes in a buffer, whose version is read without waiting."""
        counters = (
            b
            for name, b in buffers(self._task.model).items()
            if name.endswith("num_batches_tracked")
        )
        return sum(counter._version for counter in counters)
