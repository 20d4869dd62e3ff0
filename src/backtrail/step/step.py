"""One training step as a function from state to state, and its pieces as functions that can be differentiated."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from backtrail.exclusive import exclusive
from backtrail.step.dropout import SameDropout
from backtrail.step.state import State, Step
from backtrail.step.update import Update
from backtrail.task.task import Batch, Task, cut
from backtrail.tree import Tree, add, each

Weights = Float[Tensor, "*run slot"]
Gradient = tuple[Tree, Tree, Tensor]  # gradient, buffers after, loss of every slot


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
    """

    task: Task
    update: Update
    step: Step
    batches: tuple[Batch, ...]

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
    def sizes(self) -> tuple[int, ...]:
        """Number of slots of every micro-batch: none where its gradient was thrown away."""
        return tuple(len(fed.samples) if fed.contributes else 0 for fed in self.step.fed)

    def micro_batches(self) -> "list[MicroBatch]":
        """The terms of the step's loss, one per micro-batch, in order."""
        contributes = [index for index, fed in enumerate(self.step.fed) if fed.contributes]
        found = self.task.shares(
            [self.batches[i] for i in contributes], [self.sizes[i] for i in contributes]
        )
        shares = dict(zip(contributes, found, strict=True))
        return [
            MicroBatch(self, index, shares.get(index, torch.zeros(0)))
            for index in range(len(self.batches))
        ]

    def walk(
        self, state: State, weights: Weights | None = None, *, traced: bool = False
    ) -> "Iterator[tuple[Tree, Gradient]]":
        """The micro-batches in order: the buffers before each, and its part of the gradient, traceable or not."""
        buffers = state.buffers
        for micro_batch, part in zip(self.micro_batches(), self.split(weights), strict=True):
            found = (micro_batch.gradient if traced else micro_batch.slopes)(
                state.params, buffers, part
            )
            yield buffers, found
            buffers = found[1]

    @exclusive
    def raw_gradient(
        self, state: State, *, weights: Tensor | None = None, autocast: bool = True
    ) -> Gradient:
        """Gradient of L_t before clipping, the buffers it leaves, and the losses `[slot]`.

        Args:
            state: the state before the step.
            weights: of the samples `[slot]`; None: ones.
            autocast: in the precision of the training, rather than in that of the derivatives.
        """
        # and training's own kernels, so that a replay meets the recording to the bit
        with self.recorded_modes(), self.precision() if autocast else nullcontext():
            walked = list(self.walk(state, weights))
        return gathered(walked)[0], walked[-1][1][1], gathered(walked)[1]

    def clipped(self, grads: Tree) -> Tree:
        """The gradient as the optimizer consumes it."""
        return grads if self.task.clip is None else self.task.clip(grads)

    @exclusive
    def advance(self, state: State) -> State:
        """The state after the step, as it happened."""
        grads, buffers, _ = self.raw_gradient(state)
        return self.moved(state, self.clipped(grads), buffers)

    @exclusive
    def gradients_of_many(self, states: State, weights: Weights) -> tuple[Tree, Tree]:
        """Gradients of a stack of states before clipping, each with its own sample weights, and the buffers left."""

        def gradient(params: Tree, buffers: Tree, w: Tensor) -> tuple[Tree, Tree]:
            walked = list(self.walk(State(params, buffers), w, traced=True))
            return gathered(walked)[0], walked[-1][1][1]

        with self.replaying():
            found: tuple[Tree, Tree] = vmap(gradient, randomness="same")(
                states.params, states.buffers, weights
            )
        return found

    def moved_many(self, states: State, grads: Tree, buffers: Tree) -> State:
        """The stack after the update by gradients that are still to be clipped."""
        clipped = grads if self.task.clip is None else vmap(self.clipped)(grads)
        return self.moved(states, clipped, buffers)

    def moved(self, state: State, grads: Tree, buffers: Tree) -> State:
        """The state after the update by a (clipped) gradient, with the buffers that the forward passes left."""
        after = self.update(state, grads)
        return State(after.params, buffers, after.moments)

    def split(self, weights: Weights | None) -> Sequence[Tensor | None]:
        """Cut the weights of a step's slots into those of its micro-batches."""
        return (
            [None] * len(self.sizes)
            if weights is None
            else torch.split(weights, list(self.sizes), dim=-1)
        )

    def recorded_modes(self) -> AbstractContextManager[None]:
        """Put the skeleton's modules into the recorded train/eval modes."""
        return self.task.binding.in_modes(self.step.evaluating)

    def precision(self) -> AbstractContextManager[object]:
        """The autocast that the training was under; it leaves tensors in float64 alone.

        Not float16: small gradients vanish in it but for the scale of a GradScaler, which changes
        from step to step.
        """
        if self.step.autocast != "bfloat16":
            return nullcontext()
        # The cache keeps casts of parameters, which under torch.func would outlive their transform.
        return torch.autocast(
            self.task.device.type, getattr(torch, self.step.autocast), cache_enabled=False
        )

    @contextmanager
    def replaying(self, *, twice: bool = True) -> Iterator[None]:
        """Recorded train/eval modes, and attention that can be differentiated twice, or training's own."""
        with self.recorded_modes(), sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            yield


def gathered(walked: "list[tuple[Tree, Gradient]]") -> tuple[Tree, Tensor]:
    """The whole step's gradient and its losses `[slot]`, from those of its micro-batches."""
    total: Tree = {}
    for _, (gradient, _, _) in walked:
        total = add(total, gradient)
    return total, torch.cat([losses for _, (_, _, losses) in walked], -1)


@final
@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The loss term of one micro-batch: sum over its slots of c w l, with the penalty in the first."""

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

    def cut(self, slots: Tensor) -> "MicroBatch":
        """Some of its slots alone, with the same shares.

        Raises:
            NotCut: the batch is not made of rows.
        """
        batches = list(self.transition.batches)
        batches[self.index] = cut(self.batch, slots)
        return MicroBatch(
            replace(self.transition, batches=tuple(batches)), self.index, self.share[slots]
        )

    def gradient(self, params: Tree, buffers: Tree, weights: Tensor | None) -> Gradient:
        """Gradient with respect to the moving parameters; traceable by torch.func in every argument."""
        updated = {name: params[name] for name in self.transition.updated}
        rest = {name: params[name] for name in params if name not in updated}

        def loss(part: Tree) -> tuple[Tensor, tuple[Tree, Tensor]]:
            return self.loss(rest | part, buffers, weights)

        gradient, (after, losses) = grad(loss, has_aux=True)(updated)
        return gradient, after, losses

    def slopes(self, params: Tree, buffers: Tree, weights: Tensor | None) -> Gradient:
        """The same as training takes it, to the bit. Not traceable: `torch.func.grad` keeps a graph of its own."""
        leaves = {name: params[name].detach().requires_grad_() for name in self.transition.updated}
        with torch.enable_grad():
            total, (after, losses) = self.loss(params | leaves, buffers, weights)
        found = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        if total.requires_grad:
            taken = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            found = dict(zip(leaves, taken, strict=True))
        return found, each(Tensor.detach, after), losses.detach()

    def loss(
        self, params: Tree, buffers: Tree, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tree, Tensor]]:
        """The piece's loss, the buffers that its forward pass leaves, and the losses `[slot]`."""
        task = self.transition.task
        with self.randomness():
            losses, after = task.losses(params, buffers, self.batch)
        if not self.contributes:
            losses = losses.detach()[
                :0
            ]  # cut off, not multiplied by zero: they may have been infinite
        total = self.weighted(losses, weights)
        if self.index == 0 and task.penalty is not None:
            total = total + task.penalty(params)
        return total, (after, losses)

    def weighted(self, losses: Tensor, weights: Tensor | None) -> Tensor:
        """Sum over the slots of c w l."""
        share = self.share.to(losses)
        return (losses * (share if weights is None else share * weights)).sum()

    def randomness(self) -> AbstractContextManager[None]:
        """The generators as they were before the forward pass."""
        return replayed_randomness(self.transition.step.fed[self.index].random)


@contextmanager
def replayed_randomness(recorded: dict[str, bytes] | None) -> Iterator[None]:
    """Run a forward pass with the generators as they were, and leave them as they are now."""
    if recorded is None:
        yield
        return
    devices = [device for device in recorded if device != "cpu"]
    with torch.random.fork_rng(devices):
        for device, state in recorded.items():
            _set_generator(device, torch.frombuffer(bytearray(state), dtype=torch.uint8))
        with SameDropout():
            yield


def _set_generator(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
