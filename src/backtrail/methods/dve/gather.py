"""The pass over a training that gathers what the recursion of Data Value Embedding needs, shard by shard.

What was captured while it trained is taken from there; every other step is replayed once.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.accel.onednn import fast_products
from backtrail.methods.dve.live.files import KeptRows
from backtrail.methods.dve.step_features import Arrays, StepFeatures
from backtrail.methods.dve.store import EmbeddingStore
from backtrail.persample.gradients import watched
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.tree import Tree, add


@final
@dataclass(frozen=True, slots=True)
class Gathering:
    """A pass over a training.

    Attributes:
        run: the training.
        what: is gathered of a step.
        kept: what was captured while it trained.
    """

    run: Run
    what: StepFeatures
    kept: KeptRows

    def fill(self, store: EmbeddingStore, part: tuple[int, int] = (0, 1)) -> None:
        """Walk over the shards that are not done, and write them: of n equal stretches of shards, the i-th."""
        (number, of), count = part, len(store.about.shards)
        ours = range(count * number // of, count * (number + 1) // of)
        spans = {shard: store.about.shards[shard] for shard in store.missing if shard in ours}
        total, walk = sum(stop - first for first, stop in spans.values()), Walk(self.run, self.what)
        with tqdm(total=total, desc="embedding", unit="step", disable=None, leave=False) as bar:
            for shard, (first, stop) in spans.items():
                self._fill_shard(store, range(first, stop), walk, bar=bar)
                store.mark_captured(shard)

    def _fill_shard(
        self, store: EmbeddingStore, steps: range, walk: "Walk", *, bar: "tqdm[Any]"
    ) -> None:
        sizes = self.what.sizes(store.about.slots)
        blocks = {
            name: np.zeros((len(steps), *size), store.about.dtype) for name, size in sizes.items()
        }
        losses = np.full((len(steps), store.about.slots), np.nan)
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
    """The training again, a step at a time; the next one goes on where the last one ended."""

    def __init__(self, run: Run, what: StepFeatures) -> None:
        self._run, self._what = run, what
        self._there: tuple[int, State] | None = None

    def step(self, index: int) -> Arrays:
        """What is wanted of a step, and its losses `[slot]`."""
        state = self._there[1] if self._there and self._there[0] == index else self.before(index)
        transition = self._run.transition(index)
        with fast_products():
            arrays, left = self._step(transition, state)
        self._there = index + 1, self._after(transition, state, left)
        return arrays

    def before(self, step: int) -> State:
        """The state before a step, reached as this pass reaches it: so going on gives the same bits."""
        first = max(kept for kept in self._run.kept if kept <= step)
        state = self._run.state(first)
        for index in range(first, step):
            transition = self._run.transition(index)
            with fast_products():
                left = self._gradient(transition, state)
            state = self._after(transition, state, left)
        return state

    def _after(self, transition: Transition, state: State, left: tuple[Tree, Tree]) -> State:
        """The state behind a step, given its gradient and buffers; where none is needed, any."""
        index = transition.step.index + 1
        if index == self._run.steps:
            return state
        if index in self._run.kept:
            return self._run.state(index)
        return transition.moved(state, transition.clipped(left[0]), left[1])

    def _apart(self, transition: Transition) -> bool:
        """Whether the step's gradient is needed before any rows, or in another precision."""
        return bool(transition.step.autocast) or (
            len(transition.batches) > 1 and not self._what.plain
        )

    def _gradient(self, transition: Transition, state: State) -> tuple[Tree, Tree]:
        """A step's gradient before clipping, to the bit as `_step` finds it, and the buffers that it leaves."""
        if self._apart(transition):
            return transition.raw_gradient(state)[:2]
        total, buffers = dict[str, Tensor](), state.buffers
        for micro_batch in transition.micro_batches():
            seen = watched(micro_batch, state.params, buffers)
            total, buffers = add(total, seen.gradient), seen.buffers
        return total, buffers

    def _step(self, transition: Transition, state: State) -> tuple[Arrays, tuple[Tree, Tree]]:
        """A step's arrays with its losses, and what `_gradient` finds."""
        what, micro_batches, buffers, update = (
            self._what,
            transition.micro_batches(),
            state.buffers,
            transition.update,
        )
        total, response, apart = dict[str, Tensor](), None, self._apart(transition)
        if apart:
            total, after = self._gradient(transition, state)
            response = what.response(update, state, total)
        rows, losses = [], []
        for micro_batch in micro_batches:
            seen = watched(micro_batch, state.params, buffers)
            if not apart:
                total, after = add(total, seen.gradient), seen.buffers
                response = None if what.plain else what.response(update, state, total)
            drawn = what.drawn(transition.step.index, micro_batch.index)
            scaled = (
                None
                if what.plain or response is None
                else what.projection.sides | what.scaled(response.rate)
            )
            asked = what.asked(drawn, scaled)
            rows.append(dict(zip(asked, seen.rows(list(asked.values())), strict=True)))
            if what.partly and micro_batch.contributes:
                rows[-1] |= what.some_drawn(
                    micro_batch, state.params, buffers, scaled=scaled, seen=seen
                )
            losses.append(seen.losses)
            buffers = seen.buffers
        response = response or what.response(update, state, total)
        return what.arrays(rows, micro_batches, total=total, response=response) | {
            "loss": torch.cat(losses)
        }, (total, after)
