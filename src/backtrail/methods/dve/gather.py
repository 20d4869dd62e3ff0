"""The pass over a training that gathers what the recursion needs, shard by shard.

Steps that were captured during the training are read; every other step is replayed once.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from tqdm.auto import tqdm

from backtrail.accel.context import accelerated
from backtrail.methods.dve.live.files import KeptRows
from backtrail.methods.dve.step_features import Arrays, StepFeatures
from backtrail.methods.dve.store import EmbeddingStore
from backtrail.persample.gradients import trace_gradient
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.tree import Tree, add

GradientAndBuffers = tuple[Tree, Tree]


@final
@dataclass(frozen=True, slots=True)
class Gathering:
    """A pass over a training.

    Attributes:
        run: The training.
        what: What is gathered at a step.
        kept: What was captured during the training.
    """

    run: Run
    what: StepFeatures
    kept: KeptRows

    def fill(self, store: EmbeddingStore, part: tuple[int, int] = (0, 1)) -> None:
        """Write the shards that are missing.

        Args:
            store: Where they are written.
            part: (i, n): only the shards in the i-th of n equal stretches, from 0.
        """
        number, parts = part
        count = len(store.about.shards)
        own_shards = range(count * number // parts, count * (number + 1) // parts)
        missing = [shard for shard in store.missing if shard in own_shards]
        steps = [range(*store.about.shards[shard]) for shard in missing]
        walk = Walk(self.run, self.what)
        total = sum(map(len, steps))
        with tqdm(total=total, desc="embedding", unit="step", disable=None, leave=False) as bar:
            for shard, steps_of_shard in zip(missing, steps, strict=True):
                self._fill_shard(store, steps_of_shard, walk, bar=bar)
                # Only now is the shard whole: a killed pass resumes with it.
                store.mark_captured(shard)

    def _fill_shard(
        self, store: EmbeddingStore, steps: range, walk: "Walk", *, bar: "tqdm[Any]"
    ) -> None:
        dtype = store.about.dtype
        slots = store.about.slots
        blocks = {}
        for name, size in self.what.sizes(slots).items():
            blocks[name] = np.zeros((len(steps), *size), dtype)
        losses = np.full((len(steps), slots), np.nan)
        for place, step in enumerate(steps):
            arrays = self.kept.step(step) or walk.step(step)
            losses[place, : len(arrays["loss"])] = arrays["loss"].cpu().numpy()
            for name, block in blocks.items():
                block[place, : len(arrays[name])] = arrays[name].cpu().numpy()
            bar.update()
        for name, block in blocks.items():
            store.write(f"captured/{name}", block, steps.start)
        store.write("loss", losses, steps.start)


@final
class Walk:
    """Replays the training step by step; a step continues from where the last one ended."""

    def __init__(self, run: Run, what: StepFeatures) -> None:
        self._run = run
        self._what = what
        # The number and the state that the last step ended with.
        self._reached: tuple[int, State] | None = None

    def step(self, index: int) -> Arrays:
        """The arrays of a step, and its losses `[slot]`."""
        if self._reached is not None and self._reached[0] == index:
            state = self._reached[1]
        else:
            state = self.before(index)
        transition = self._run.transition(index)
        with accelerated():
            arrays, gradient_and_buffers = self._features(transition, state)
        self._reached = index + 1, self._after(transition, state, gradient_and_buffers)
        return arrays

    def before(self, step: int) -> State:
        """The state before a step, bit-identical to the one that `step` continues from."""
        first = max(kept for kept in self._run.kept if kept <= step)
        state = self._run.state(first)
        for index in range(first, step):
            transition = self._run.transition(index)
            with accelerated():
                gradient_and_buffers = self._gradient(transition, state)
            state = self._after(transition, state, gradient_and_buffers)
        return state

    def _after(
        self, transition: Transition, state: State, gradient_and_buffers: GradientAndBuffers
    ) -> State:
        """The state after a step: the kept one where there is one."""
        index = transition.step.index + 1
        if index == self._run.steps:
            # Nothing comes after it, so that its value does not matter.
            return state
        if index in self._run.kept:
            return self._run.state(index)
        gradient, buffers = gradient_and_buffers
        return transition.apply_update(state, transition.clip(gradient), buffers)

    def _gradient_comes_first(self, transition: Transition) -> bool:
        """Whether the step's whole gradient is needed before any rows, or in another precision."""
        if transition.step.autocast:
            return True
        return len(transition.batches) > 1 and not self._what.plain

    def _gradient(self, transition: Transition, state: State) -> GradientAndBuffers:
        """The gradient before clipping, and the buffers after it, as `_features` finds them."""
        if self._gradient_comes_first(transition):
            gradient, buffers, _ = transition.raw_gradient(state)
            return gradient, buffers
        total: Tree = {}
        buffers = state.buffers
        for micro_batch in transition.micro_batches():
            traced = trace_gradient(micro_batch, state.params, buffers)
            total = add(total, traced.gradient)
            buffers = traced.buffers
        return total, buffers

    def _features(self, transition: Transition, state: State) -> tuple[Arrays, GradientAndBuffers]:
        """A step's arrays with its losses, and what `_gradient` finds."""
        what = self._what
        update = transition.update
        micro_batches = transition.micro_batches()
        gradient_comes_first = self._gradient_comes_first(transition)
        total: Tree = {}
        after = state.buffers
        response = None
        if gradient_comes_first:
            total, after = self._gradient(transition, state)
            response = what.response(update, state, total)
        rows = []
        losses = []
        buffers = state.buffers
        for micro_batch in micro_batches:
            traced = trace_gradient(micro_batch, state.params, buffers)
            if not gradient_comes_first:
                total = add(total, traced.gradient)
                after = traced.buffers
                if not what.plain:
                    response = what.response(update, state, total)
            scaled = None
            if not what.plain and response is not None:
                scaled = what.projection.sides | what.scaled(response.rate)
            sampled_loss = what.sampled_loss(transition.step.index, micro_batch.index)
            requested = what.requested(sampled_loss, scaled)
            found = traced.rows(list(requested.values()))
            arrays = dict(zip(requested, found, strict=True))
            if what.partly and micro_batch.contributes:
                arrays |= what.rows_of_chosen(
                    micro_batch, state.params, buffers, scaled=scaled, seen=traced
                )
            rows.append(arrays)
            losses.append(traced.losses)
            buffers = traced.buffers
        if response is None:
            response = what.response(update, state, total)
        arrays = what.arrays(rows, micro_batches, total=total, response=response)
        arrays["loss"] = torch.cat(losses)
        return arrays, (total, after)
