"""Captures what an embedding needs of a training while it trains, from the loop's own forward and backward passes.

The model's calls are watched (`watching.py`), and the cotangents of what parameters helped to compute are taken from
the loop's backward pass as they come by. Nothing is computed twice; labels drawn from the model cost a backward pass to
the activations. What was seen proves itself at the steps that the recorder proves: against the rows of a replay.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from whence.errors import NotCaptured
from whence.methods.embedding.heard import Heard
from whence.methods.embedding.kept_rows import RowsWriter
from whence.methods.embedding.step_rows import StepRows
from whence.replay.capture import watched
from whence.replay.state import State
from whence.replay.transition import Transition
from whence.task import Batch
from whence.tree import Tree


@final
class Alongside:
    """Listens to the model of a training, and writes down what every step leaves."""

    def __init__(self, what: StepRows, trained: Mapping[str, nn.Parameter], writer: RowsWriter) -> None:
        self._what, self._trained, self._writer = what, trained, writer
        self._now: Heard | None = None
        self._raw: Tree = {}  # gradients before clipping
        self._own: list[Tensor] = []  # rows of the last step, for its proof
        self._losses = torch.zeros(0)
        what.task.binding  # noqa: B018 - the skeleton is copied before there are hooks that it would copy
        model, depth = what.task.model, [0]

        def enter(module: nn.Module, args: object) -> None:
            del args
            if module is not model or torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return  # a copy of the model, say
            depth[0] += 1
            if depth[0] == 1 and self._now is not None:
                self._now.enter()

        def leave(module: nn.Module, args: object, output: Any) -> None:
            del args
            if module is not model or not depth[0]:
                return
            depth[0] -= 1
            if not depth[0] and self._now is not None:
                self._now.leave(output)

        self._hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
        if what.task.clip is not None:
            self._hooks += [self._note_raw(name, p) for name, p in trained.items()]

    def listen(self, batch: Batch, step: int, piece: int) -> Heard:
        """Hear the passes on the batch that is about to be fed."""
        leaves: Tree = {name: parameter for name, parameter in self._trained.items() if parameter.requires_grad}
        self._now = Heard(self._what.task, batch, leaves, drawn=self._what.drawn(step, piece))
        return self._now

    def stepped(
        self, transition: Transition, state: State, heard: Sequence[Heard], *, consumed: Tree, proving: bool
    ) -> None:
        """Write down what a step leaves that is about to be made, and let go of what was heard.

        Args:
            transition: the step.
            state: the state before it.
            heard: by micro-batch.
            consumed: the gradient that the optimizer is given.
            proving: `prove` comes next.

        Raises:
            NotCaptured: the passes were not seen.
        """
        what, pieces = self._what, transition.pieces()
        gradient = {name: self._raw.get(name, tensor) for name, tensor in consumed.items()}
        answer = what.answer(transition, state, gradient)
        rows, losses, self._own = [], [], []
        for piece, one in zip(pieces, heard, strict=True):
            if piece.counted:
                passed = one.passed(piece)
                rows.append(what.rows(passed, one.drawn, None if what.plain else answer))
                losses.append(passed.losses)
                if proving:
                    self._own.append(passed.rows([what.projection.sides])[0][0])
            one.forget()
        arrays = what.arrays(rows, pieces, total=gradient, answer=answer)
        self._losses = torch.cat(losses)
        self._writer.add(transition.step.index, arrays | {"loss": self._losses})

    def prove(self, transition: Transition, state: State, *, tolerance: float) -> None:
        """Compare the losses and gradients of the step's samples with those of a replay.

        Raises:
            NotCaptured: they differ.
        """
        buffers, step, rows, losses = state.buffers, transition.step.index, [], []
        for piece in transition.pieces():
            seen = watched(piece, state.params, buffers)
            buffers = seen.buffers
            if seen.froze:
                raise NotCaptured(step, "BatchNorm in train mode makes every loss depend on every sample")
            if piece.counted:
                rows.append(seen.rows([self._what.projection.sides])[0][0])
                losses.append(seen.losses)
        off = max(_apart(self._losses, torch.cat(losses)), _apart(torch.cat(self._own), torch.cat(rows)))
        if not off <= tolerance:
            raise NotCaptured(step, f"losses or gradients differ from those of a replay by {off:.2g} (relative)")

    def finish(self) -> None:
        """Stop listening, and write what waits."""
        for hook in self._hooks:
            hook.remove()
        self._now = None
        self._writer.flush()

    def _note_raw(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        def note(updated: Tensor) -> None:
            assert updated.grad is not None
            self._raw[name] = updated.grad.detach().clone()

        found: RemovableHandle = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        return found


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
