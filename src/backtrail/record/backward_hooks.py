"""Which watched batches the coming step consumes, found by a gradient hook on every parameter.

A backward pass that meets no gradients starts a new list of batches; any other pass adds its batch
to the list. So gradient accumulation, `zero_grad()` before or after the step, and steps that a
GradScaler skips are all recorded correctly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backtrail.errors import OtherSlots, SparseGradient, StaleGradient, UnwatchedStep
from backtrail.hooks import LocalHook
from backtrail.record.listeners import BatchListener
from backtrail.record.randomness import generator_states
from backtrail.run.tensors import cpu_copy, digest
from backtrail.step.state import BatchRecord
from backtrail.task.clipping import ClipValue
from backtrail.task.task import Batch, Task, size_of
from backtrail.task.torch_compile import buffers, modules
from backtrail.tree import Tree, count_writes, mapping_to_dict

ALWAYS_COPIED = 2**16  # entries; buffers up to this size are copied whether they changed or not


@final
@dataclass(frozen=True, slots=True)
class LiveBatch:
    """A batch as the loader yielded it, and the state of the training at that moment.

    Attributes:
        samples: row numbers or ids, in slot order.
        epoch: which pass over the loader it came from.
        digest: content hash.
        content: a copy of the batch, where its rows cannot be read again.
        random: states of the random generators; empty once it is known that the forward pass drew
            no random numbers.
        buffers: the model's buffers.
        statistics_updates: how often the running statistics of batch norm had been updated.
        contributes: whether the step consumes its gradient; if not, its forward pass only updated
            those statistics.
        captured: what the listener captures of the passes on it, if there is a listener.
        may_depend_on_model: whether the loop replaced it by something that may depend on the model.
    """

    samples: tuple[int, ...]
    epoch: int
    digest: str
    content: Batch | None
    random: dict[str, bytes]
    buffers: Tree
    statistics_updates: int
    contributes: bool = True
    captured: Any = None
    may_depend_on_model: bool = False

    def as_record(self) -> BatchRecord:
        """Return the entry of the step log."""
        return BatchRecord(
            samples=self.samples,
            epoch=self.epoch,
            digest=self.digest,
            random=self.random or None,
            stored=self.content is not None,
            contributes=self.contributes,
            may_depend_on_model=self.may_depend_on_model,
        )


@final
class BatchTracker:
    """Follows the backward passes of a training.

    Attributes:
        step: number of the coming step.
        consumed: the batches of the coming step, in order: those whose gradients it consumes, and
            those that only updated batch norm's statistics since the last step.
        evaluating: modules that were in eval mode at the last backward pass.
        autocast: the precision that the model was last called under; empty without autocast.
        listener: captures the passes of every batch, if there is one.
    """

    def __init__(self, task: Task, trained: Mapping[str, nn.Parameter]) -> None:
        self._task = task
        self._trained = trained
        self._hooks: dict[str, RemovableHandle] = {}
        # For every large buffer: the tensor, the version that was copied, and the copy.
        self._buffer_copies: dict[str, tuple[Tensor, int, Tensor]] = {}
        # For every parameter: its gradient as a backward pass of the coming step left it, writes to
        # it, and its norm if the task clips.
        self._accumulated: dict[str, tuple[Tensor, int, Tensor | None]] = {}
        self._current: LiveBatch | None = None
        self.listener: BatchListener | None = None
        self.step = 0
        self.consumed: list[LiveBatch] = []
        self.evaluating: tuple[str, ...] = ()
        self.autocast = ""

    def install_hooks(self) -> None:
        """Hook the parameters that require gradients by now, and the calls of the modules.

        Called again before every batch, because a loop may unfreeze parameters as it goes.
        """
        if not self._hooks:
            self._hook_forward_calls()
        for name, parameter in self._trained.items():
            if parameter.requires_grad and name not in self._hooks:
                hook = LocalHook(partial(self._on_gradient, name))
                self._hooks[name] = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
                note = partial(self._note_accumulated, name)
                note_hook = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
                self._hooks[f"accumulated:{name}"] = note_hook

    def _hook_forward_calls(self) -> None:
        device_type = self._task.device.type
        # The task copies the model on first use. Do it now: a later copy would contain our hooks.
        self._task.binding  # noqa: B018

        def note_autocast(module: nn.Module, args: object) -> None:
            del module, args
            if torch.is_autocast_enabled(device_type):
                dtype = torch.get_autocast_dtype(device_type)
                self.autocast = str(dtype).removeprefix("torch.")
            else:
                self.autocast = ""

        hook = LocalHook(note_autocast)
        for name, module in modules(self._task.model).items():
            # Only modules with parameters of their own compute something that autocast changes.
            has_parameters = any(True for _ in module.parameters(recurse=False))
            if has_parameters:
                self._hooks[f"call:{name}"] = module.register_forward_pre_hook(hook)

    def remove_hooks(self) -> None:
        """Remove every hook from the model."""
        for hook in self._hooks.values():
            hook.remove()

    def batch_yielded(
        self, samples: tuple[int, ...], batch: Batch, *, epoch: int, keep: bool
    ) -> None:
        """Note the batch that is about to be handed to the loop.

        Args:
            samples: row numbers or ids, in slot order.
            batch: its content.
            epoch: which pass over the loader it comes from.
            keep: whether its content is to be stored in the run.
        """
        self.install_hooks()
        self.finish_current_batch()
        batch = mapping_to_dict(batch)
        self._current = LiveBatch(
            samples=samples,
            epoch=epoch,
            digest=digest(batch),
            content=cpu_copy(batch) if keep else None,
            random=generator_states(self._task.device),
            buffers=self.current_buffers(),
            statistics_updates=self._count_statistics_updates(),
            captured=self._capture(batch),
        )

    def finish_current_batch(self) -> None:
        """List the current batch if it updated batch norm and no backward pass followed.

        Such a batch has no gradient, but a replay must repeat it to reach the same statistics.
        """
        current = self._current
        if current is None:
            return
        already_listed = bool(self.consumed) and self.consumed[-1] is current
        if already_listed or self._count_statistics_updates() == current.statistics_updates:
            return
        self.consumed.append(replace(current, contributes=False))

    def batch_replaced(self, batch: Batch, *, may_depend_on_model: bool) -> None:
        """Note that the model is fed `batch` instead of the batch last yielded.

        Raises:
            UnwatchedStep: no batch was yielded yet.
            OtherSlots: it has another number of rows.
        """
        if self._current is None:
            raise UnwatchedStep(self.step)
        batch = mapping_to_dict(batch)
        rows = size_of(batch)
        if rows != len(self._current.samples):
            raise OtherSlots(rows, len(self._current.samples))
        # The loop may have drawn random numbers to make the batch (mixup), so the forward pass
        # starts from the generators as they are now.
        self._current = replace(
            self._current,
            content=cpu_copy(batch),
            digest=digest(batch),
            random=generator_states(self._task.device),
            captured=self._capture(batch),
            may_depend_on_model=may_depend_on_model,
        )

    def step_taken(self) -> None:
        """Start the list of the next step.

        The loop may go on with the same batch (several losses, or several steps, on one batch). Its
        next forward pass then starts from the generators and buffers as they are now.
        """
        last = self.consumed[-1]
        self.consumed = []
        self._accumulated = {}
        self.step += 1
        captured = None if last.captured is None else self._capture(last.captured.batch)
        self._current = replace(
            last,
            random=generator_states(self._task.device),
            buffers=self.current_buffers(),
            statistics_updates=self._count_statistics_updates(),
            captured=captured,
        )
        self.install_hooks()

    def _capture(self, batch: Batch) -> Any:
        if self.listener is None:
            return None
        return self.listener.on_batch(batch, self.step, len(self.consumed))

    def has_gradient(self) -> bool:
        """Whether a batch since the last step had a backward pass."""
        return any(batch.contributes for batch in self.consumed)

    def _note_accumulated(self, name: str, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        size = None
        if self._task.clip is not None:
            size = torch.linalg.vector_norm(grad.detach())
        self._accumulated[name] = (grad, count_writes(grad), size)

    def unclipped_norm(self) -> float | None:
        """Norm of the accumulated gradient before the loop clipped it.

        None where it is not known: the loop did something else to the gradient as well, such as the
        unscaling of a `GradScaler`, or put another tensor in its place.
        """
        # clip_grad_value_ writes twice, by its lower and its upper bound.
        clipping_writes = 2 if isinstance(self._task.clip, ClipValue) else 1
        squares = 0.0
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            grad, writes, size = self._accumulated.get(name, (None, 0, None))
            if grad is not parameter.grad or size is None:
                return None
            if count_writes(parameter.grad) - writes > clipping_writes:
                return None
            squares += float(size) ** 2
        return math.sqrt(squares)

    def buffers_after_last_step(self) -> Tree:
        """Copies of the model's buffers as the last step left them.

        Batches that were fed since and led to no step may have changed the live ones.
        """
        self.finish_current_batch()
        return self.consumed[0].buffers if self.consumed else self.current_buffers()

    def current_buffers(self) -> Tree:
        """Copies of the model's buffers; large ones are copied again only after a change."""
        copies: Tree = {}
        for name, buffer in buffers(self._task.model).items():
            copies[name] = self._copy_of_buffer(name, buffer)
        return copies

    def _copy_of_buffer(self, name: str, buffer: Tensor) -> Tensor:
        # Native batch norm kernels write running statistics without counting as writes, so that
        # count tells nothing about them. They are small: copy such buffers always.
        if buffer.numel() <= ALWAYS_COPIED:
            return buffer.detach().clone()
        known = self._buffer_copies.get(name)
        if known is not None:
            tensor, version, copy = known
            if tensor is buffer and version == count_writes(buffer):
                return copy
        copy = buffer.detach().clone()
        self._buffer_copies[name] = (buffer, count_writes(buffer), copy)
        return copy

    def _on_gradient(self, name: str, grad: Tensor) -> None:
        """Add the current batch to the coming step, at the first gradient of its backward pass.

        Raises:
            SparseGradient: the gradient is not a dense tensor.
            StaleGradient: gradients of the step before are still there.
        """
        if grad.layout != torch.strided:
            raise SparseGradient(name, self.step)
        current = self._current
        if current is None:
            return
        if self.consumed and self.consumed[-1] is current:
            return  # another parameter of the same pass, or a second loss on the same batch
        if generator_states(self._task.device) == current.random:
            # The forward pass drew nothing. Storing no states keeps the log small, and a replay
            # need not restore them.
            current = replace(current, random={})
            self._current = current
        names = [
            module_name
            for module_name, module in modules(self._task.model).items()
            if not module.training
        ]
        self.evaluating = tuple(names)
        if self._gradients_are_clear():
            self.consumed = [*self._batches_with_statistics_only(current), current]
            return
        if not any(batch.contributes for batch in self.consumed):
            # There are gradients, but no batch of this step made them.
            raise StaleGradient(self.step)
        self.consumed = [*self.consumed, current]

    def _gradients_are_clear(self) -> bool:
        """Whether every gradient is None or zero: `zero_grad(set_to_none=False)` leaves zeros.

        A gradient that a batch of the coming step left at zero is not clear, nobody has cleared it:
        the batch counts in the mean over micro-batches.
        """
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            grad, writes, _ = self._accumulated.get(name, (None, 0, None))
            untouched = grad is parameter.grad and writes == count_writes(parameter.grad)
            if untouched or bool(parameter.grad.any()):
                return False
        return True

    def _batches_with_statistics_only(self, current: LiveBatch) -> list[LiveBatch]:
        """Listed batches that updated batch norm and whose gradients were discarded.

        A batch updated the statistics if the count has grown when the batch after it is fed.
        """
        kept: list[LiveBatch] = []
        following = [*self.consumed[1:], current]
        for batch, after in zip(self.consumed, following, strict=False):
            if batch.statistics_updates != after.statistics_updates:
                kept.append(replace(batch, contributes=False))
        return kept

    def _count_statistics_updates(self) -> int:
        """How often any layer has updated its running statistics.

        Batch norm layers count in the buffer `num_batches_tracked`. Its writes are
        known without waiting for the device.
        """
        count = 0
        for name, buffer in buffers(self._task.model).items():
            if name.endswith("num_batches_tracked"):
                count += count_writes(buffer)
        return count
