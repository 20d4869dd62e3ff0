"""A group of samples removed from a training: first-order effect on a state, and exact replay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.methods.observe import trained_samples
from backtrail.methods.renormalize import check_renormalizable
from backtrail.methods.retrain.stacks import autocast_gradients
from backtrail.methods.retrain.weights import Removal
from backtrail.run.run import Precision, Run
from backtrail.step.optimizers import NONNEGATIVE
from backtrail.step.state import State
from backtrail.sweep.rerun import rerun
from backtrail.sweep.rules import Rules
from backtrail.sweep.tangent import DualState, push_forward
from backtrail.tree import Tree, add, norm


@final
@dataclass(frozen=True, slots=True)
class RemovedGroup:
    """Samples that are removed together from a run.

    Attributes:
        run: the recorded training.
        removal: the samples, and what their removal does to a batch's mean.
        dtype: precision of the replay; None for the recorded one.
    """

    run: Run
    removal: Removal
    dtype: Precision = None

    @staticmethod
    def of(
        run: Run, samples: Sequence[int], *, renormalize: bool = False, dtype: Precision = None
    ) -> "RemovedGroup":
        """Samples of a run.

        Raises:
            UnknownSample: a sample that the training set does not have.
            UnknownId: a sample that the training did not see, where samples have ids of their own.
            NeverTrainedOn: a sample that was in no batch.
            CannotRenormalize: the batch's denominator cannot be renormalised in this run.
        """
        group = frozenset(trained_samples(run, samples))
        if renormalize:
            check_renormalizable(run)
        removal = Removal(group, (0, run.steps), renormalize=renormalize)
        return RemovedGroup(run, removal, dtype)

    @property
    def first(self) -> int:
        """The last state that the removal does not change: that before the group's first visit."""
        return self.removal.first(self.run)

    def weights(self, step: int, like: Tensor) -> Tensor:
        """Weights of a step's slots without the group: `[slot]`."""
        return self.removal.weights(self.run, step).to(like)

    def sweep(self, stop: int, rules: Rules) -> Iterator[tuple[int, DualState]]:
        """The states from the group's first visit to `stop`, each with its first-order change."""
        self.run.find_cancelled()
        first = min(self.first, stop)
        state = self.run.state(first, replay=True, dtype=self.dtype)
        transition = self.run.transition(min(first, self.run.steps - 1), self.dtype)
        now = DualState.unchanged(transition, state)
        yield first, now
        steps = range(first, stop)
        for step in tqdm(steps, desc="forgetting", unit="step", disable=None, leave=False):
            like = next(iter(now.state.params.values()))
            weight_change = self.weights(step, like) - 1
            transition = self.run.transition(step, self.dtype)
            after = push_forward(transition, now, weight_change, rules=rules)
            if step + 1 in self.run.kept:
                # The recorded state has none of the rounding that the replay gathers.
                recorded = self.run.state(step + 1, dtype=self.dtype)
                after = DualState(recorded, after.tangent)
            now = after
            yield step + 1, now

    def linearity_gap(self, step: int, before: DualState, after: DualState) -> tuple[float, float]:
        r"""How far one real step without the group is from its first-order prediction.

        With U the update of the step, G the group, and :math:`\dot\theta, \dot\theta'` the
        first-order changes before and after the step,

        .. math:: \| U(\theta + \dot\theta; -G) - U(\theta) - \dot\theta' \|, \qquad
            \| U(\theta + \dot\theta; -G) - U(\theta) - \dot\theta \|

        The first is 0 where training is linear at this scale; the second says how far the step
        moves the change, to compare it with.
        """
        stack = self._rerun(step, stacked(before.state, changed_state(before)), stop=step + 1)
        actual: Tree = {}
        for name in after.tangent.params:
            unperturbed, without = stack.params[name]
            actual[name] = without - unperturbed
        return _distance(actual, after.tangent.params), _distance(actual, before.tangent.params)

    def replayed(self, start: int, begun: State) -> State:
        """The final state when the steps from `start` on run again without the group.

        The training as it was runs along; the result is the recorded final state, moved by the
        difference of the two runs.

        Args:
            start: number of the state at which the replay begins.
            begun: the state there that the run without the group begins with.
        """
        as_recorded = self.run.state(start, replay=True, dtype=self.dtype)
        stack = self._rerun(start, stacked(as_recorded, begun), stop=self.run.steps)
        end = self.run.state(self.run.steps, replay=True, dtype=self.dtype)
        params = _moved_by_difference(end.params, stack.params)
        buffers = _moved_by_difference(end.buffers, stack.buffers)
        return State(params, buffers)

    def _rerun(self, start: int, states: State, *, stop: int) -> State:
        """Run the steps [start, stop): row 0 with all samples, row 1 without the group."""
        like = next(iter(states.params.values()))

        def weights(step: int) -> Tensor:
            without = self.weights(step, like)
            return torch.stack([torch.ones_like(without), without])

        after = rerun(
            lambda step: self.run.transition(step, self.dtype),
            states,
            weights,
            start=start,
            stop=stop,
            trained=autocast_gradients(self.run, start),
        )
        for _, state in after:
            states = state
        return states


def stacked(first: State, second: State) -> State:
    """A stack of two states of one training."""
    stack = first.repeat(2)
    for name, tensor in second.params.items():
        stack.params[name][1] = tensor
    for name, tensor in second.buffers.items():
        stack.buffers[name][1] = tensor
    for name, moments in stack.moments.items():
        for key, tensor in moments.items():
            # Step counts have no axis of runs, since all runs share them.
            if tensor.dim() > second.moments[name][key].dim():
                tensor[1] = second.moments[name][key]
    return stack


def changed_state(now: DualState) -> State:
    """A state plus its first-order change; what cannot be negative stays non-negative."""
    state = now.state
    change = now.tangent
    moments: dict[str, Tree] = {}
    for name, tree in state.moments.items():
        changes = change.moments.get(name, {})
        moments[name] = tree | {key: _added(key, tree[key], changes[key]) for key in changes}
    buffers = {
        name: _added(name, state.buffers[name], tensor) for name, tensor in change.buffers.items()
    }
    return State(add(state.params, change.params), state.buffers | buffers, moments)


def _added(name: str, value: Tensor, change: Tensor) -> Tensor:
    r"""The sum of a tensor v and its change.

    Of what cannot be negative it is :math:`v^2 / (v - \dot v)` where the change is negative, which
    has the same first order.

    >>> _added("exp_avg_sq", torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.5, -1.0, 0.0]))
    tensor([1.5000, 0.5000, 0.0000])
    """
    if name not in NONNEGATIVE and not name.endswith("running_var"):
        return value + change
    return torch.where(change < 0, value * (value / (value - change)), value + change)


def _distance(left: Tree, right: Tree) -> float:
    return norm({name: tensor - right[name] for name, tensor in left.items()})


def _moved_by_difference(tree: Tree, stack: Tree) -> Tree:
    """Add to each tensor what the second run of a stack has more than the first."""
    moved: Tree = {}
    for name, tensor in tree.items():
        unperturbed, without = stack[name]
        moved[name] = tensor + (without - unperturbed)
    return moved
