"""Captures per-sample gradient sketches from the training loop's own forward and backward passes.

The model's calls are traced (`persample/trace.py`), and cotangents are taken from the loop's
backward pass as they arrive. Nothing is computed twice. Labels sampled from the model cost a
backward pass to the activations, or a pass of their own where only some samples' are sampled.

The rows are checked whenever the model uses its parameters in another way, and at steps 0, 1, 4,
16, ...: with random weights of the samples, they must add up to the gradient that a replay finds
with those weights.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backtrail.accel.context import accelerated
from backtrail.errors import NotCaptured, join_items
from backtrail.hooks import LocalHook
from backtrail.methods.dve.live.early_rates import Early, Now
from backtrail.methods.dve.live.files import RowsWriter
from backtrail.methods.dve.live.hooks import LOSS, PROOF, BatchHooks
from backtrail.methods.dve.step_features import Arrays, StepFeatures
from backtrail.optim.steady_state import SteadyState
from backtrail.persample.check import WeightedSum, random_weights
from backtrail.persample.sketch import KroneckerSketch
from backtrail.step.state import State, is_check_due
from backtrail.step.step import MicroBatch, Transition
from backtrail.task.task import Batch
from backtrail.tree import Tree

log = logging.getLogger(__name__)


@final
class LiveCapture:
    """Records what every step of a training leaves, from hooks on its model.

    Args:
        what: What is gathered of a step.
        trained: The live parameters that the optimizer holds.
        writer: Where the arrays go.
        now: Returns the update and the state as they are.
    """

    def __init__(
        self,
        what: StepFeatures,
        trained: Mapping[str, nn.Parameter],
        writer: RowsWriter,
        *,
        now: Now,
    ) -> None:
        self._what = what
        self._trained = trained
        self._writer = writer
        # The batch whose passes are recorded now.
        self._current: BatchHooks | None = None
        # Gradients before clipping.
        self._raw: Tree = {}
        # Reductions of gradients as the coming step's update moves them.
        self._scaled: dict[str, KroneckerSketch] = {}
        # Rows of a step's own gradients and its gradient, until they are checked.
        self._proof: tuple[Tensor, Tree] | None = None
        # Ways of using parameters, and the step that first used them so.
        self._proven: dict[Hashable, int] = {}
        uses_early_rates = not what.plain and what.task.clip is None
        self._early = Early(what, now) if uses_early_rates else None
        self._held = ExitStack()
        # What waits for a step is allocated and freed at every step.
        self._held.enter_context(accelerated(products=False, keep_memory=True))
        # The skeleton is copied before there are hooks that would be copied with it.
        what.task.binding  # noqa: B018
        self._hooks = self._register(what.task.model)
        self._gradient_hooks: dict[str, RemovableHandle] = {}

    def on_batch(self, batch: Batch, step: int, micro_batch: int) -> BatchHooks:
        """Record the passes over the batch that is about to be fed."""
        trained = {
            name: parameter for name, parameter in self._trained.items() if parameter.requires_grad
        }
        if self._what.task.clip is not None or self._early is not None:
            for name, parameter in trained.items():
                if name not in self._gradient_hooks:
                    self._gradient_hooks[name] = self._note_gradient(name, parameter)
        self._current = BatchHooks(
            self._what,
            batch,
            dict(trained),
            sampled_loss=self._what.sampled_loss(step, micro_batch),
            proves=partial(self._proves, step),
        )
        return self._current

    def before_step(
        self,
        transition: Transition,
        state: State,
        captured: Sequence[BatchHooks],
        *,
        consumed: Tree,
    ) -> bool:
        """Write down a step that the optimizer is about to make, and release its passes.

        Args:
            transition: The step.
            state: The state before it.
            captured: What was recorded, by micro-batch.
            consumed: The gradient that the optimizer is given.

        Returns:
            Whether `check` is to be called for the step.

        Raises:
            NotCaptured: The passes were not seen.
        """
        gradient = {name: self._raw.get(name, tensor) for name, tensor in consumed.items()}
        response = self._response(transition, state, gradient, hooks=captured)
        self._proof = None
        if response is not None:
            rows = self._rows(transition.micro_batches(), state, captured)
            self._write(transition, rows, gradient, response=response)
        self._scaled = {}
        for hooks in captured:
            hooks.forget()
        return self._proof is not None

    def check(self, transition: Transition, state: State, *, tolerance: float) -> None:
        """Check the rows of a step against a replay of it.

        If they disagree, everything since the last check is taken back.

        Raises:
            NotCaptured: The rows do not add up to the gradient.
        """
        assert self._proof is not None
        rows, gradient = self._proof
        self._proof = None
        step = transition.step.index
        sizes = list(transition.slot_counts)
        random = random_weights(sum(sizes), step)
        replayed, _, _ = transition.raw_gradient(state, weights=random)
        # The rows, weighted by omega - 1, must add up to the difference of the two gradients, in
        # which the gradient of a penalty cancels.
        parts = []
        for micro_batch, part in zip(
            transition.micro_batches(), torch.split(random, sizes), strict=True
        ):
            if micro_batch.contributes:
                parts.append(micro_batch.share.to(rows) * (part.to(rows) - 1))
        expected = {name: replayed[name] - gradient[name] for name in replayed}
        truth = WeightedSum(torch.cat(parts), expected, tolerance)
        projection = self._what.projection
        by_parameter = {name: rows[:, place] for name, place in projection.layout.items()}
        unlike = truth.disagreeing(by_parameter, projection.sides)
        if unlike:
            self._writer.take_back()
            names = join_items(sorted(unlike), most=3)
            raise NotCaptured(step, f"they do not add up to the gradient of {names}")
        self._writer.verified()

    def close(self) -> None:
        """Remove the hooks, and write what waits."""
        for hook in (*self._hooks, *self._gradient_hooks.values()):
            hook.remove()
        self._held.close()
        self._current = None
        self._writer.flush()

    def _rows(
        self, micro_batches: Sequence[MicroBatch], state: State, captured: Sequence[BatchHooks]
    ) -> list[Arrays]:
        """Rows by micro-batch, from the recorded passes and, if partly, of the chosen samples."""
        what = self._what
        scaled = None if what.plain else what.projection.sides | self._scaled
        rows = []
        for micro_batch, hooks in zip(micro_batches, captured, strict=True):
            if not micro_batch.contributes:
                continue
            arrays = hooks.rows(micro_batch)
            # Released before there is another graph.
            hooks.forget()
            if what.partly:
                with accelerated():
                    arrays |= what.rows_of_chosen(
                        micro_batch, state.params, state.buffers, scaled=scaled
                    )
            rows.append(arrays)
        return rows

    def _write(
        self, transition: Transition, rows: list[Arrays], gradient: Tree, *, response: SteadyState
    ) -> None:
        losses = torch.cat([arrays.pop(LOSS) for arrays in rows])
        if all(PROOF in arrays for arrays in rows):
            self._proof = torch.cat([arrays[PROOF] for arrays in rows]), gradient
        for arrays in rows:
            arrays.pop(PROOF, None)
        kept = self._what.arrays(
            rows, transition.micro_batches(), total=gradient, response=response
        )
        kept[LOSS] = losses
        self._writer.add(transition.step.index, kept)

    def _response(
        self, transition: Transition, state: State, gradient: Tree, *, hooks: Sequence[BatchHooks]
    ) -> SteadyState | None:
        """What the update makes of the gradient, with all rows settled.

        None where rows were settled too early, with rates that turned out wrong.
        """
        what = self._what
        known: SteadyState | None = SteadyState({}, {})
        if self._early is not None:
            known = self._early.taken(transition.update, gradient)
        if known is None:
            log.info(
                "Step %d will be replayed: its gradient changed after the backward pass.",
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
            for one in hooks:
                one.settle(scaled)
        return known | response

    def _note_scaled(self, rate: Tree) -> dict[str, KroneckerSketch]:
        scaled = self._what.scaled(rate)
        self._scaled |= scaled
        return scaled

    def _proves(self, step: int, kinds: Hashable) -> bool:
        """Whether a pass that used parameters in these ways is to be checked."""
        first_step = self._proven.setdefault(kinds, step)
        return first_step == step or is_check_due(step)

    def _register(self, model: nn.Module) -> list[RemovableHandle]:
        # A model may call itself; only the outermost call is the loop's.
        depth = 0

        def enter(module: nn.Module, args: object) -> None:
            nonlocal depth
            del args
            # Hooks are copied with a model, and a copy's calls are not the training's.
            is_other = module is not model
            if is_other or torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return
            depth += 1
            if depth == 1 and self._current is not None:
                self._current.enter()

        def leave(module: nn.Module, args: object, output: Any) -> None:
            nonlocal depth
            del args
            if module is not model or not depth:
                return
            depth -= 1
            if not depth and self._current is not None:
                self._current.leave(output)

        return [
            model.register_forward_pre_hook(LocalHook(enter)),
            # Also after a call that failed, which must not leave the tracer entered.
            model.register_forward_hook(LocalHook(leave), always_call=True),
        ]

    def _note_gradient(self, name: str, parameter: Tensor) -> RemovableHandle:
        def note(updated: Tensor) -> None:
            gradient = updated.grad
            assert gradient is not None
            if self._what.task.clip is not None:
                # The loop clips in place, so that a copy is needed.
                self._raw[name] = gradient.detach().clone()
            elif self._early is not None and self._current is not None:
                rate = self._early.arrived(name, gradient, waiting=self._current.fresh)
                if rate:
                    self._current.settle(self._note_scaled(rate))
                    self._current.fresh = 0

        hook = LocalHook(note)
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return handle
