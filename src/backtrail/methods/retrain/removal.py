"""A group of samples removed from a recorded training: its first-order effect on a state, and a replay without it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.influence.tables import places
from backtrail.methods.renormalize import check_renormalizable
from backtrail.methods.retrain.stacks import as_trained
from backtrail.methods.retrain.weights import Removal
from backtrail.run.run import Precision, Run
from backtrail.step.optimizers import NONNEGATIVE
from backtrail.step.state import State
from backtrail.sweep.rerun import rerun
from backtrail.sweep.rules import Rules
from backtrail.sweep.tangent import Changed, push_forward
from backtrail.tree import add, norm


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Samples that are removed together from a run.

    Attributes:
        run: the recorded training.
        removal: which samples, and what that does to a batch's mean.
        dtype: precision of the replay; None for the recorded one.
    """

    run: Run
    removal: Removal
    dtype: Precision = None

    @staticmethod
    def of(
        run: Run, samples: Sequence[int], *, renormalize: bool = False, dtype: Precision = None
    ) -> "Group":
        """Samples of a run.

        Raises:
            UnknownSample: a sample that the training set does not have.
            UnknownId: a sample that the training did not see, where samples have ids of their own.
            CannotRenormalize: the batch's denominator has no such meaning.
        """
        places(run.ids, samples)
        if renormalize:
            check_renormalizable(run)
        return Group(
            run,
            Removal(frozenset(map(int, samples)), (0, run.steps), renormalize=renormalize),
            dtype,
        )

    @property
    def first(self) -> int:
        """The last state that the group has not changed: that of its first visit."""
        return self.removal.first(self.run)

    def weights(self, step: int, like: Tensor) -> Tensor:
        """Weights of a step's slots without the group."""
        return self.removal.weights(self.run, step).to(like)

    def sweep(self, stop: int, rules: Rules) -> Iterator[tuple[int, Changed]]:
        """The states up to `stop` with their first-order changes, from the group's first visit on."""
        first = min(self.first, stop)
        state = self.run.state(first, replay=True, dtype=self.dtype)
        now = Changed.begin(self.run.transition(min(first, self.run.steps - 1), self.dtype), state)
        yield first, now
        steps = tqdm(range(first, stop), desc="forgetting", unit="step", disable=None, leave=False)
        for index in steps:
            like = next(iter(now.state.params.values()))
            transition = self.run.transition(index, self.dtype)
            after, change = push_forward(
                transition, now, self.weights(index, like) - 1, rules=rules
            )
            kept = index + 1 in self.run.kept
            now = Changed(self.run.state(index + 1, dtype=self.dtype) if kept else after, change)
            yield index + 1, now

    def bend(self, step: int, before: Changed, after: Changed) -> tuple[float, float]:
        r"""How far a real step without the group is from what first order says of it, and how far it moves the change.

        .. math:: \| U(\theta + \dot\theta; -G) - U(\theta) - \dot\theta' \|, \qquad
            \| U(\theta + \dot\theta; -G) - U(\theta) - \dot\theta \|

        The first is 0 where training is linear at this scale.
        """
        stack = self._without(step, beside(before.state, moved(before)), stop=step + 1)
        real = {name: stack.params[name][1] - stack.params[name][0] for name in after.change.params}
        off, far = (
            norm({name: tensor - change.params[name] for name, tensor in real.items()})
            for change in (after.change, before.change)
        )
        return off, far

    def replayed(self, start: int, begun: State) -> State:
        """The final state when the steps from `start` on run again without the group, from another state there.

        The training as it was runs along; the result is the recorded end, moved by the difference
        of the two.
        """
        alike, end = (
            self.run.state(n, replay=True, dtype=self.dtype) for n in (start, self.run.steps)
        )
        stack = self._without(start, beside(alike, begun), stop=self.run.steps)
        params, buffers = (
            {name: tensor + (stacked[name][1] - stacked[name][0]) for name, tensor in tree.items()}
            for tree, stacked in ((end.params, stack.params), (end.buffers, stack.buffers))
        )
        return State(params, buffers)

    def _without(self, start: int, states: State, *, stop: int) -> State:
        """Run the steps [start, stop) again: the first of two states as it happened, the second without the group."""
        like = next(iter(states.params.values()))

        def weights(step: int) -> Tensor:
            without = self.weights(step, like)
            return torch.stack([torch.ones_like(without), without])

        trained = (
            as_trained(self.run, start) if any(step.autocast for step in self.run.log) else None
        )
        steps = rerun(
            lambda step: self.run.transition(step, self.dtype),
            states,
            weights,
            start=start,
            stop=stop,
            trained=trained,
        )
        return reduce(lambda _, numbered: numbered[1], steps, states)


def beside(first: State, second: State) -> State:
    """A stack of two states of one training."""
    stacked = first.repeat(2)
    for whole, tree in ((stacked.params, second.params), (stacked.buffers, second.buffers)):
        for name, tensor in tree.items():
            whole[name][1] = tensor
    for name, tree in stacked.moments.items():
        for key, tensor in tree.items():
            if tensor.dim() > second.moments[name][key].dim():
                tensor[1] = second.moments[name][key]
    return stacked


def moved(now: Changed) -> State:
    """A state after its first-order change; what cannot be negative stays so."""
    state, change = now.state, now.change
    moments = {
        name: tree
        | {
            key: _added(key, tree[key], tensor)
            for key, tensor in change.moments.get(name, {}).items()
        }
        for name, tree in state.moments.items()
    }
    buffers = {
        name: _added(name, state.buffers[name], tensor) for name, tensor in change.buffers.items()
    }
    return State(add(state.params, change.params), state.buffers | buffers, moments)


def _added(name: str, value: Tensor, change: Tensor) -> Tensor:
    r"""The sum; of what cannot be negative, :math:`v^2 / (v - \dot v)` where it shrinks, which is alike to first order.

    >>> _added("exp_avg_sq", torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.5, -1.0, 0.0]))
    tensor([1.5000, 0.5000, 0.0000])
    """
    if name not in NONNEGATIVE and not name.endswith("running_var"):
        return value + change
    return torch.where(change < 0, value * (value / (value - change)), value + change)
