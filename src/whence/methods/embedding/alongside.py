"""Captures what an embedding needs of a training while it trains, from the loop's own forward and backward passes.

The model's calls are watched (`watching.py`), and the cotangents of what parameters helped to compute are taken from
the loop's backward pass as they come by. Nothing is computed twice; labels drawn from the model cost a backward pass to
the activations, or a pass of their own where only some samples' are drawn.

What was seen proves itself whenever the model uses its parameters in another way, and at steps 0, 1, 4, 16, ...: with
random weights of the samples, their rows must add up to the gradient that a replay finds with those weights.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from whence.errors import NotCaptured, listed
from whence.methods.embedding.early import Early, Now
from whence.methods.embedding.heard import LOSS, PROOF, Heard
from whence.methods.embedding.kept_rows import RowsWriter
from whence.methods.embedding.step_rows import Arrays, StepRows
from whence.replay.explained import Weighted, weights
from whence.replay.heap import kept_heap
from whence.replay.lasting import Lasting
from whence.replay.matrices import at_hand, fast_products
from whence.replay.sides import Sides
from whence.replay.state import State, due
from whence.replay.transition import Piece, Transition
from whence.task import Batch
from whence.tree import Tree

log = logging.getLogger(__name__)


@final
class Alongside:
    """Listens to the model of a training, and writes down what every step leaves."""

    def __init__(self, what: StepRows, trained: Mapping[str, nn.Parameter], writer: RowsWriter, *, now: Now) -> None:
        self._what, self._trained, self._writer = what, trained, writer
        self._now: Heard | None = None
        self._raw: Tree = {}  # gradients before clipping
        self._scaled: dict[str, Sides] = {}  # reductions of the coming step
        self._proof: tuple[Tensor, Tree] | None = None  # rows of a step's own gradients, and its gradient
        self._proven: dict[Hashable, int] = {}  # ways of using parameters, and the step that first met them
        self._early = None if what.plain or what.task.clip is not None else Early(what, now)
        self._held = ExitStack()
        self._held.enter_context(kept_heap())  # what waits for a step comes and goes with every step
        self._held.enter_context(at_hand())
        what.task.binding  # noqa: B018 - the skeleton is copied before there are hooks that it would copy
        self._hooks = self._listening(what.task.model)
        self._noted = dict[str, RemovableHandle]()

    def listen(self, batch: Batch, step: int, piece: int) -> Heard:
        """Hear the passes on the batch that is about to be fed."""
        leaves: Tree = {name: parameter for name, parameter in self._trained.items() if parameter.requires_grad}
        if self._what.task.clip is not None or self._early is not None:
            self._noted |= {n: self._note_gradient(n, p) for n, p in leaves.items() if n not in self._noted}
        proves = partial(self._proves, step)
        self._now = Heard(self._what, batch, leaves, drawn=self._what.drawn(step, piece), proves=proves)
        return self._now

    def stepped(self, transition: Transition, state: State, heard: Sequence[Heard], *, consumed: Tree) -> bool:
        """Write down what a step leaves that is about to be made, and let go of what was heard.

        Returns whether that is to be proven.

        Args:
            transition: the step.
            state: the state before it.
            heard: by micro-batch.
            consumed: the gradient that the optimizer is given.

        Raises:
            NotCaptured: the passes were not seen.
        """
        gradient = {name: self._raw.get(name, tensor) for name, tensor in consumed.items()}
        answer = self._answer(transition, state, gradient, heard=heard)
        self._proof = None
        if answer is not None:
            rows = self._rows(transition.pieces(), state, heard)
            self._write(transition, rows, gradient, answer=answer)
        self._scaled = {}
        for one in heard:
            one.forget()
        return self._proof is not None

    def prove(self, transition: Transition, state: State, *, tolerance: float) -> None:
        """Compare what the step left with a replay; what came since the last such proof goes, if it does not agree.

        Raises:
            NotCaptured: the rows do not add up to the gradient.
        """
        assert self._proof is not None
        (rows, gradient), self._proof = self._proof, None
        step, pieces = transition.step.index, transition.pieces()
        random = weights(sum(transition.sizes), step)
        found = transition.raw_gradient(state, weights=random)[0]
        parts = zip(pieces, torch.split(random, list(transition.sizes)), strict=True)
        # Beyond the gradient of the step itself, which may have a penalty's in it.
        omega = torch.cat([piece.share.to(rows) * (part.to(rows) - 1) for piece, part in parts if piece.counted])
        truth = Weighted(omega, {name: found[name] - gradient[name] for name in found}, tolerance)
        layout = self._what.projection.layout
        unlike = truth.unlike({name: rows[:, place] for name, place in layout.items()}, self._what.projection.sides)
        if unlike:
            self._writer.distrust()
            raise NotCaptured(step, f"they do not add up to the gradient of {listed(sorted(unlike), most=3)}")
        self._writer.proven()

    def finish(self) -> None:
        """Stop listening, and write what waits."""
        for hook in (*self._hooks, *self._noted.values()):
            hook.remove()
        self._held.close()
        self._now = None
        self._writer.flush()

    def _rows(self, pieces: Sequence[Piece], state: State, heard: Sequence[Heard]) -> list[Arrays]:
        """By micro-batch, of what was heard and, where that is not all, of chosen samples."""
        what, found = self._what, list[Arrays]()
        scaled = None if what.plain else what.projection.sides | self._scaled
        for piece, one in zip(pieces, heard, strict=True):
            if piece.counted:
                rows = one.rows(piece)
                one.forget()  # before there is another graph
                with fast_products():
                    more = what.some_drawn(piece, state.params, state.buffers, scaled=scaled) if what.partly else {}
                found.append(rows | more)
        return found

    def _write(self, transition: Transition, rows: list[Arrays], gradient: Tree, *, answer: Lasting) -> None:
        losses = torch.cat([one.pop(LOSS) for one in rows])
        if all(PROOF in one for one in rows):
            self._proof = torch.cat([one[PROOF] for one in rows]), gradient
        kept = [{name: array for name, array in one.items() if name != PROOF} for one in rows]
        arrays = self._what.arrays(kept, transition.pieces(), total=gradient, answer=answer)
        self._writer.add(transition.step.index, arrays | {LOSS: losses})

    def _answer(
        self, transition: Transition, state: State, gradient: Tree, *, heard: Sequence[Heard]
    ) -> Lasting | None:
        """What the update makes of the gradient, with all rows settled; None where some were settled too early."""
        what, early = self._what, self._early
        known = Lasting({}, {}) if early is None else early.taken(transition.update, gradient)
        if known is None:
            log.info("step %d is replayed later: its gradient changed after it was there", transition.step.index)
            self._early = None
            self._proven.clear()
            return None
        rest = {name: tensor for name, tensor in gradient.items() if name not in known.rate}
        if not rest:
            return known
        answer = what.answer(transition.update, state, rest)
        if not what.plain:
            scaled = self._note_scaled(answer.rate)
            for one in heard:
                one.settle(scaled)
        return known | answer

    def _note_scaled(self, rate: Tree) -> dict[str, Sides]:
        found = self._what.scaled(rate)
        self._scaled |= found
        return found

    def _proves(self, step: int, kinds: Hashable) -> bool:
        """Whether a pass of this kind is to prove itself."""
        return self._proven.setdefault(kinds, step) == step or due(step)

    def _listening(self, model: nn.Module) -> list[RemovableHandle]:
        depth = [0]

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

        return [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]

    def _note_gradient(self, name: str, parameter: Tensor) -> RemovableHandle:
        def note(updated: Tensor) -> None:
            gradient, now = updated.grad, self._now
            assert gradient is not None
            if self._what.task.clip is not None:
                self._raw[name] = gradient.detach().clone()
            elif self._early is not None and now is not None:
                rate = self._early.arrived(name, gradient, waiting=now.fresh)
                if rate:
                    now.settle(self._note_scaled(rate))
                    now.fresh = 0

        found: RemovableHandle = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        return found
