r"""One training step as a function from state to state, and the terms of its loss.

The loss of step t is the sum of one term for each micro-batch. With parameters θ, slot weights w,
shares c of the slots and penalty R,

.. math:: L_t(\theta; w) = \sum_b c_{t,b}\, w_{t,b}\, \ell_b(\theta) + R(\theta)

A `Transition` is the step as a whole, a `MicroBatch` one term of its loss. Every function here runs
the forward passes as training did: in the recorded train/eval modes, with the recorded states of
the random generators, and each micro-batch with the buffers that the one before it left.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from backtrail.exclusive import exclusive
from backtrail.step.state import State, Step
from backtrail.step.update import Update
from backtrail.task.noise import drawn_as_recorded
from backtrail.task.task import Batch, Task, select_rows
from backtrail.tree import Tree, add, each, precision_of

Weights = Float[Tensor, "*run slot"]


@final
class Gradient(NamedTuple):
    """Gradient of one or several loss terms, and what their forward passes leave.

    Attributes:
        gradient: with respect to the parameters that the step updates, before clipping.
        buffers: the model's buffers after the last forward pass.
        losses: loss of every slot, unweighted, `[slot]`.
    """

    gradient: Tree
    buffers: Tree
    losses: Tensor


@runtime_checkable
class StepCheck(Protocol):
    """Compares a step that is computed again with what was recorded about it."""

    @property
    def state_is_known(self) -> bool:
        """Whether the state after the step was recorded."""
        ...

    def check_gradient(self, consumed: Tree) -> None:
        """Compare the gradient that the optimizer consumes.

        Raises:
            ReplayMismatch: it differs from the recorded one.
        """
        ...

    def check_state(self, after: State) -> None:
        """Compare the state after the step.

        Raises:
            ReplayMismatch: it differs from the recorded one.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Transition:
    """Step t of a training: its batches and its update.

    Attributes:
        task: model, data and loss.
        update: the optimizer with the step's hyperparameters.
        step: what was recorded about the step.
        batches: the content of its micro-batches, on the task's device and in the replay's
            precision.
        check: compares the step with the recording whenever its gradient is computed; None where
            it is computed on purpose in another way (in another precision, with other weights).
        slot_weights: factors of the slots' losses, `[slot]`, for a training that is run with other
            weights than the recorded one; None: ones. The weights w that the functions take are
            relative to them: the loss is that of the weights `slot_weights * w`.
    """

    task: Task
    update: Update
    step: Step
    batches: tuple[Batch, ...]
    check: StepCheck | None = None
    slot_weights: Float[Tensor, " slot"] | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """Parameters that the optimizer may ever change."""
        return tuple(name for group in self.update.groups for name in group)

    @property
    def updated(self) -> tuple[str, ...]:
        """Parameters that this step changes."""
        unused = frozenset(self.step.unused)
        return tuple(name for name in self.trained if name not in unused)

    @property
    def slot_counts(self) -> tuple[int, ...]:
        """Number of slots of every micro-batch; 0 where its gradient was thrown away."""
        return tuple(len(fed.samples) if fed.contributes else 0 for fed in self.step.fed)

    def micro_batches(self) -> "list[MicroBatch]":
        """The terms of the step's loss, one per micro-batch, in order."""
        contributing = [index for index, fed in enumerate(self.step.fed) if fed.contributes]
        shares = self.task.shares(
            [self.batches[index] for index in contributing],
            [self.slot_counts[index] for index in contributing],
        )
        if self.slot_weights is not None and self.task.total is None:
            factors = torch.split(self.slot_weights, [len(share) for share in shares])
            weighted = zip(shares, factors, strict=True)
            shares = [share * factor.to(share) for share, factor in weighted]
        by_index = dict(zip(contributing, shares, strict=True))
        none = torch.zeros(0)
        return [
            MicroBatch(self, index, by_index.get(index, none)) for index in range(len(self.batches))
        ]

    def split_weights(self, weights: Weights | None) -> Sequence[Tensor | None]:
        """Split the weights of a step's slots into those of its micro-batches."""
        if weights is None:
            return [None] * len(self.slot_counts)
        return torch.split(weights, list(self.slot_counts), dim=-1)

    def micro_batch_gradients(
        self, state: State, weights: Weights | None = None, *, traceable: bool = False
    ) -> Iterator[tuple[Tree, Gradient]]:
        """Compute the gradient of each micro-batch's loss term, in order.

        Args:
            state: the state before the step.
            weights: of the slots, `[slot]`; None: ones.
            traceable: by `MicroBatch.traceable_gradient`, else `gradient_as_trained`.

        Yields:
            The buffers before each micro-batch's forward pass, and its gradient.
        """
        buffers = state.buffers
        weights_of_each = self.split_weights(weights)
        for micro_batch, its_weights in zip(self.micro_batches(), weights_of_each, strict=True):
            compute = (
                micro_batch.traceable_gradient if traceable else micro_batch.gradient_as_trained
            )
            result = compute(state.params, buffers, its_weights)
            yield buffers, result
            buffers = result.buffers

    @exclusive
    def raw_gradient(
        self, state: State, *, weights: Tensor | None = None, autocast: bool = True
    ) -> Gradient:
        """Compute the gradient of L_t before clipping.

        It is that of the training to the bit, since it uses the training's kernels and, unless
        `autocast` is False, the training's precision.

        Args:
            state: the state before the step.
            weights: of the slots, `[slot]`; None: ones.
            autocast: under the recorded autocast; False: in the precision of the derivatives.
        """
        with self.recorded_modes(), self.recorded_autocast() if autocast else nullcontext():
            return accumulate(result for _, result in self.micro_batch_gradients(state, weights))

    def clip(self, grads: Tree) -> Tree:
        """The gradient as the optimizer consumes it, from the raw one."""
        return grads if self.task.clip is None else self.task.clip(grads)

    @exclusive
    def advance(self, state: State) -> State:
        """The state after the step, as it happened.

        Raises:
            ReplayMismatch: the task does not reproduce the recorded step.
        """
        raw = self.raw_gradient(state)
        consumed = self.clip(raw.gradient)
        if self.check is not None:
            self.check.check_gradient(consumed)
        after = self.apply_update(state, consumed, raw.buffers)
        if self.check is not None and self.check.state_is_known:
            self.check.check_state(after)
        return after

    def apply_update(self, state: State, grads: Tree, buffers: Tree) -> State:
        """The state after an update.

        Args:
            state: the state before it, or a stack of states.
            grads: the clipped gradient.
            buffers: the model's buffers as the step's forward passes leave them.
        """
        after = self.update(state, grads)
        return State(after.params, buffers, after.moments)

    @exclusive
    def gradients_of_stack(self, states: State, weights: Weights) -> tuple[Tree, Tree]:
        """Raw gradients of a stack of states, each with its own slot weights.

        Args:
            states: the states before the step, each tensor `[run, ...]`.
            weights: of the slots, `[run, slot]`.

        Returns:
            Gradients before clipping, and buffers after the step, each tensor `[run, ...]`.
        """

        def gradient_of_one(params: Tree, buffers: Tree, w: Tensor) -> tuple[Tree, Tree]:
            state = State(params, buffers)
            results = self.micro_batch_gradients(state, w, traceable=True)
            total = accumulate(result for _, result in results)
            return total.gradient, total.buffers

        with self.replaying():
            # Every run gets the recorded masks.
            gradient_of_each = vmap(gradient_of_one, randomness="same")
            found: tuple[Tree, Tree] = gradient_of_each(states.params, states.buffers, weights)
            return found

    def apply_update_to_stack(self, states: State, grads: Tree, buffers: Tree) -> State:
        """The stack of states after the update by raw gradients, each clipped by its own norm."""
        clipped = grads if self.task.clip is None else vmap(self.clip)(grads)
        return self.apply_update(states, clipped, buffers)

    def recorded_modes(self) -> AbstractContextManager[None]:
        """Put the modules of the task's copy of the model into the recorded train/eval modes."""
        return self.task.binding.in_modes(self.step.evaluating)

    def recorded_autocast(self) -> AbstractContextManager[object]:
        """The autocast that the training was under; it leaves tensors in float64 alone.

        Not float16: without the scale of a GradScaler, which changes from step to step, small
        gradients vanish in it.
        """
        if self.step.autocast != "bfloat16":
            return nullcontext()
        # The cache keeps casts of parameters, which under torch.func would outlive their transform.
        return torch.autocast(
            self.task.device.type, getattr(torch, self.step.autocast), cache_enabled=False
        )

    @contextmanager
    def replaying(self, *, double_backward: bool = True) -> Iterator[None]:
        """Run forward passes in the recorded train/eval modes.

        Args:
            double_backward: with the one attention kernel that has a second derivative, which
                rounds differently from the training's; False: with the training's own.
        """
        kernel = sdpa_kernel(SDPBackend.MATH) if double_backward else nullcontext()
        with self.recorded_modes(), kernel:
            yield


def accumulate(results: Iterable[Gradient]) -> Gradient:
    """Add the gradients of a step's micro-batches in order, as training accumulates them."""
    gradient: Tree = {}
    buffers: Tree = {}
    losses: list[Tensor] = []
    for result in results:
        gradient = add(gradient, result.gradient)
        buffers = result.buffers
        losses.append(result.losses)
    return Gradient(gradient, buffers, torch.cat(losses, -1))


@final
@dataclass(frozen=True, slots=True)
class MicroBatch:
    r"""The loss term of one micro-batch, :math:`\sum_b c_b w_b \ell_b`; the first also has R.

    Attributes:
        transition: the step.
        index: which of the step's micro-batches.
        share: c of every slot, times the transition's `slot_weights` (but for `Task(total=...)`);
            empty where the gradient was thrown away.
    """

    transition: Transition
    index: int
    share: Float[Tensor, " slot"]

    @property
    def contributes(self) -> bool:
        """Whether the update consumed its gradient."""
        return self.transition.step.fed[self.index].contributes

    @property
    def batch(self) -> Batch:
        """What was fed to the model."""
        return self.transition.batches[self.index]

    def select_slots(self, slots: Tensor) -> "MicroBatch":
        """The term of some of its slots alone, with the same shares.

        Raises:
            NotCut: the batch is not made of rows.
        """
        batches = list(self.transition.batches)
        batches[self.index] = select_rows(self.batch, slots)
        transition = replace(self.transition, batches=tuple(batches))
        return MicroBatch(transition, self.index, self.share[slots])

    def gradient_as_trained(self, params: Tree, buffers: Tree, weights: Tensor | None) -> Gradient:
        """Gradient by `torch.autograd.grad`: that of the training to the bit, but not traceable.

        (`torch.func.grad` also builds the graph of a further derivative, and may round otherwise.)
        """
        leaves = {name: params[name].detach().requires_grad_() for name in self.transition.updated}
        with torch.enable_grad():
            total, (buffers_after, losses) = self.loss(params | leaves, buffers, weights)
        gradient = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        # A term without any slot and without penalty depends on no parameter.
        if total.requires_grad:
            grads = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            gradient = dict(zip(leaves, grads, strict=True))
        return Gradient(gradient, each(Tensor.detach, buffers_after), losses.detach())

    def traceable_gradient(self, params: Tree, buffers: Tree, weights: Tensor | None) -> Gradient:
        """Gradient by `torch.func.grad`: traceable in every argument, equal up to rounding."""
        updated = {name: params[name] for name in self.transition.updated}
        constant = {name: params[name] for name in params if name not in updated}

        def loss(part: Tree) -> tuple[Tensor, tuple[Tree, Tensor]]:
            return self.loss(constant | part, buffers, weights)

        gradient, (buffers_after, losses) = grad(loss, has_aux=True)(updated)
        return Gradient(gradient, buffers_after, losses)

    def loss(
        self, params: Tree, buffers: Tree, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tree, Tensor]]:
        """The term's value, the buffers that its forward pass leaves, and the losses `[slot]`."""
        task = self.transition.task
        with self.recorded_randomness(params):
            outputs, buffers_after = task.outputs(params, buffers, self.batch)
            total, losses = self.value(outputs, weights)
        if self.index == 0 and task.penalty is not None:
            total = total + task.penalty(params)
        return total, (buffers_after, losses)

    def value(self, outputs: Any, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The term without the penalty as a function of the outputs, and the losses `[slot]`.

        With `Task(total=...)` no losses exist, and NaN stands in their place.
        """
        task = self.transition.task
        if task.total is None:
            losses = task.losses_of(outputs, self.batch)
            if not self.contributes:
                # Cut off, not multiplied by zero: they may have been infinite.
                losses = losses.detach()[:0]
            return self.weighted_sum(losses, weights), losses
        if weights is None:
            size = len(self.transition.step.fed[self.index].samples)
            weights = torch.ones(size, dtype=task.real_dtype(outputs), device=task.device)
        if not self.contributes:
            nothing = weights.new_zeros(0)
            return nothing.sum(), nothing
        if self.transition.slot_weights is not None:
            # The function takes weights, not shares.
            counts = list(self.transition.slot_counts)
            factor = torch.split(self.transition.slot_weights, counts)[self.index]
            weights = weights * factor.to(weights)
        total = task.total_of(outputs, self.batch, weights)
        losses = torch.full_like(weights.detach(), math.nan, dtype=total.dtype)
        return total * self.share[0].to(total), losses

    def weighted_sum(self, losses: Tensor, weights: Tensor | None) -> Tensor:
        r"""Sum over the slots, :math:`\sum_b c_b w_b \ell_b`."""
        factors = self.share.to(losses)
        if weights is not None:
            factors = factors * weights
        return (losses * factors).sum()

    def recorded_randomness(self, params: Tree) -> AbstractContextManager[None]:
        """The random generators as they were before the forward pass, with the training's numbers.

        Args:
            params: of the pass, which may have another precision than the training.
        """
        recorded = self.transition.step.fed[self.index].random
        return generators_in(
            recorded, trained_in=self.transition.task.dtype, computed_in=precision_of(params)
        )


@contextmanager
def generators_in(
    recorded: dict[str, bytes] | None, *, trained_in: torch.dtype, computed_in: torch.dtype
) -> Iterator[None]:
    """Set the default random generators, and restore them afterwards.

    Args:
        recorded: state of the generator of each device; None leaves all of them alone.
        trained_in: precision of the training, in which the numbers are drawn.
        computed_in: precision of the pass, into which they are cast.
    """
    if recorded is None:
        yield
        return
    devices = [device for device in recorded if device != "cpu"]
    with torch.random.fork_rng(devices):
        for device, state in recorded.items():
            _set_generator(device, torch.frombuffer(bytearray(state), dtype=torch.uint8))
        with drawn_as_recorded(trained_in, computed_in):
            yield


def _set_generator(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
