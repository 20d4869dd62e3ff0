"""Captures what an embedding needs of a training while it trains, from the loop's own forward and backward passes.

The model's calls are watched (`watching.py`), and the cotangents of what parameters helped to
compute are taken from the loop's backward pass as they come by. Nothing is computed twice; labels
drawn from the model cost a backward pass to the activations, or a pass of their own where only some
samples' are drawn.

What was seen proves itself whenever the model uses its parameters in another way, and at steps 0,
1, 4, 16, ...: with random weights of the samples, their rows must add up to the gradient that a
replay finds with those weights.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backtrail.accel.allocator import keep_heap
from backtrail.accel.onednn import fast_products, installed
from backtrail.errors import NotCaptured, join_items
from backtrail.methods.dve.live.early_rates import Early, Now
from backtrail.methods.dve.live.files import RowsWriter
from backtrail.methods.dve.live.hooks import LOSS, PROOF, BatchHooks
from backtrail.methods.dve.step_features import Arrays, StepFeatures
from backtrail.optim.steady_state import Lasting
from backtrail.persample.check import Weighted, weights
from backtrail.persample.sketch import KroneckerSketch
from backtrail.step.state import State, due
from backtrail.step.step import MicroBatch, Transition
from backtrail.task.task import Batch
from backtrail.tree import Tree

log = logging.getLogger(__name__)


@final
class LiveCapture:
    """Listens to the model of a training, and writes down what every step leaves."""

    def __init__(
        self,
        what: StepFeatures,
        trained: Mapping[str, nn.Parameter],
        writer: RowsWriter,
        *,
        now: Now,
    ) -> None:
        self._what, self._trained, self._writer = what, trained, writer
        self._now: BatchHooks | None = None
        self._raw: Tree = {}  # gradients before clipping
        self._scaled: dict[str, KroneckerSketch] = {}  # reductions of the coming step
        self._proof: tuple[Tensor, Tree] | None = (
            None  # rows of a step's own gradients, and its gradient
        )
        self._proven: dict[
            Hashable, int
        ] = {}  # ways of using parameters, and the step that first met them
        self._early = None if what.plain or what.task.clip is not None else Early(what, now)
        self._held = ExitStack()
        self._held.enter_context(
            keep_heap()
        )  # what waits for a step comes and goes with every step
        self._held.enter_context(installed())
        what.task.binding  # noqa: B018 - the skeleton is copied before there are hooks that it would copy
        self._hooks = self._listening(what.task.model)
        self._noted = dict[str, RemovableHandle]()

    def listen(self, batch: Batch, step: int, micro_batch: int) -> BatchHooks:
        """Hear the passes on the batch that is about to be fed."""
        leaves: Tree = {
            name: parameter for name, parameter in self._trained.items() if parameter.requires_grad
        }
        if self._what.task.clip is not None or self._early is not None:
            self._noted |= {
                n: self._note_gradient(n, p) for n, p in leaves.items() if n not in self._noted
            }
        proves = partial(self._proves, step)
        self._now = BatchHooks(
            self._what, batch, leaves, drawn=self._what.drawn(step, micro_batch), proves=proves
        )
        return self._now

    def stepped(
        self, transition: Transition, state: State, heard: Sequence[BatchHooks], *, consumed: Tree
    ) -> bool:
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
        response = self._answer(transition, state, gradient, heard=heard)
        self._proof = None
        if response is not None:
            rows = self._rows(transition.micro_batches(), state, heard)
            self._write(transition, rows, gradient, response=response)
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
        step, micro_batches = transition.step.index, transition.micro_batches()
        random = weights(sum(transition.sizes), step)
        found = transition.raw_gradient(state, weights=random)[0]
        parts = zip(micro_batches, torch.split(random, list(transition.sizes)), strict=True)
        # Beyond the gradient of the step itself, which may have a penalty's in it.
        omega = torch.cat(
            [
                micro_batch.share.to(rows) * (part.to(rows) - 1)
                for micro_batch, part in parts
                if micro_batch.contributes
            ]
        )
        truth = Weighted(omega, {name: found[name] - gradient[name] for name in found}, tolerance)
        layout = self._what.projection.layout
        unlike = truth.unlike(
            {name: rows[:, place] for name, place in layout.items()}, self._what.projection.sides
        )
        if unlike:
            self._writer.distrust()
            raise NotCaptured(
                step, f"they do not add up to the gradient of {join_items(sorted(unlike), most=3)}"
            )
        self._writer.proven()

    def finish(self) -> None:
        """Stop listening, and write what waits."""
        for hook in (*self._hooks, *self._noted.values()):
            hook.remove()
        self._held.close()
        self._now = None
        self._writer.flush()

    def _rows(
        self, micro_batches: Sequence[MicroBatch], state: State, heard: Sequence[BatchHooks]
    ) -> list[Arrays]:
        """By micro-batch, of what was heard and, where that is not all, of chosen samples."""
        what, found = self._what, list[Arrays]()
        scaled = None if what.plain else what.projection.sides | self._scaled
        for micro_batch, one in zip(micro_batches, heard, strict=True):
            if micro_batch.contributes:
                rows = one.rows(micro_batch)
                one.forget()  # before there is another graph
                with fast_products():
                    more = (
                        what.some_drawn(micro_batch, state.params, state.buffers, scaled=scaled)
                        if what.partly
                        else {}
                    )
                found.append(rows | more)
        return found

    def _write(
        self, transition: Transition, rows: list[Arrays], gradient: Tree, *, response: Lasting
    ) -> None:
        losses = torch.cat([one.pop(LOSS) for one in rows])
        if all(PROOF in one for one in rows):
            self._proof = torch.cat([one[PROOF] for one in rows]), gradient
        kept = [{name: array for name, array in one.items() if name != PROOF} for one in rows]
        arrays = self._what.arrays(
            kept, transition.micro_batches(), total=gradient, response=response
        )
        self._writer.add(transition.step.index, arrays | {LOSS: losses})

    def _answer(
        self, transition: Transition, state: State, gradient: Tree, *, heard: Sequence[BatchHooks]
    ) -> Lasting | None:
        """What the update makes of the gradient, with all rows settled; None where some were settled too early."""
        what, early = self._what, self._early
        known = Lasting({}, {}) if early is None else early.taken(transition.update, gradient)
        if known is None:
            log.info(
                "step %d is replayed later: its gradient changed after it was there",
                transition.step.index,
            )
            self._early = None
            self._proven.clear()
            return None
        rest = {name: tensor for name, tensor in gradient.items() if name not in known.rate}
        if not rest:
            return known
        response = what.response(transition.update, state, rest)
        if not what.plain:
            scaled = self._note_scaled(response.rate)
            for one in heard:
                one.settle(scaled)
        return known | response

    def _note_scaled(self, rate: Tree) -> dict[str, KroneckerSketch]:
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

        return [
            model.register_forward_pre_hook(enter),
            model.register_forward_hook(leave, always_call=True),
        ]

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
