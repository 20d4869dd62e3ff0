"""The recorder's self-check: the recorded step reproduces the gradient that the loop computed."""

import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import final

import torch
from torch.amp import grad_scaler

from backtrail.curvature.vjp import GradientVJP, gradient_vjp, gradient_vjp_by_differences
from backtrail.errors import (
    BacktrailError,
    BadLoss,
    CoarseNoise,
    NoDerivative,
    NotCut,
    UnexplainedGradient,
    UnrepeatableRows,
)
from backtrail.record.backward_hooks import LiveBatch
from backtrail.run.run import AUTOCAST
from backtrail.run.tensors import digest
from backtrail.step.state import State, Step, is_check_due
from backtrail.step.step import MicroBatch, Transition
from backtrail.task.noise import CoarseDraws
from backtrail.task.task import Batch, Task
from backtrail.tree import Tree, cast, norm

MAX_NEW_SHAPES = 8  # kinds of step that are checked when they first occur
ROWS_TRIED = 2  # of a batch, to find out whether its gradient can be differentiated
log = logging.getLogger(__name__)
DerivativeOfGradient = Callable[..., GradientVJP]


@final
class GradientCheck:
    """Decides which steps to check, and checks them.

    Args:
        tolerance: allowed relative difference of the gradients; None chooses it by precision.
    """

    def __init__(self, tolerance: float | None) -> None:
        self._tolerance = tolerance
        self._seen_shapes: set[object] = set()

    def is_due(self, step: Step) -> bool:
        """Whether to check this step: 0, 1, powers of four, and steps of a new shape.

        The shape of a step is made of the sizes of its micro-batches, its unused parameters, its
        modules in eval mode and its autocast. Each selects other code in the user's loop.
        """
        sizes = tuple((len(fed.samples), fed.contributes) for fed in step.fed)
        shape = (sizes, step.unused, step.evaluating, step.autocast)
        # Where every step has a new shape (ragged batches), checking them all would double the time
        # of the training.
        is_new = shape not in self._seen_shapes and len(self._seen_shapes) < MAX_NEW_SHAPES
        if is_new:
            self._seen_shapes.add(shape)
        return is_new or is_check_due(step.index)

    def tolerance(self, step: Step, consumed: Tree) -> float:
        """Allowed relative difference of the gradients of a step."""
        if self._tolerance is not None:
            return self._tolerance
        return default_gradient_tolerance(step, consumed)

    def check(
        self,
        transition: Transition,
        state: State,
        consumed: Tree,
        *,
        unclipped_norm: float | None = None,
    ) -> None:
        """Compute the gradient of a step as a replay will, and compare it with the consumed one.

        Args:
            transition: the step.
            state: the state before it.
            consumed: the gradient that the loop gave the optimizer.
            unclipped_norm: norm of the loop's gradient before it was clipped; None: not known.

        Raises:
            UnexplainedGradient: they differ.
            CoarseNoise: the model draws random numbers in the precision of autocast.
            NoDerivative: at step 0, that no derivative of the gradient can be taken.
            BadLoss: the task's loss does not return one value per slot.
        """
        if transition.step.index == 0:
            _check_losses(transition, state)
        draws = CoarseDraws()
        with draws if transition.step.autocast else nullcontext():
            raw_gradient, _, _ = transition.raw_gradient(state)
        if draws.found:
            raise CoarseNoise(transition.step.index, list(draws.found))
        replayed = transition.clip(raw_gradient)
        gap = norm({name: replayed[name] - consumed[name] for name in replayed})
        largest = max(norm(consumed), norm(replayed), 1e-30)  # both may be zero
        off = gap / largest
        allowed = self.tolerance(transition.step, consumed)
        patched = transition.task.patched_modules
        # Written as `not <=`, so that NaN fails too.
        if not off <= allowed:
            raise UnexplainedGradient(
                transition.step.index,
                off,
                allowed,
                ours=norm(replayed),
                theirs=norm(consumed),
                patched=patched,
            )
        if unclipped_norm is not None and change_by_clipping(raw_gradient, replayed) > allowed:
            # Clipped to the same norm, gradients look alike whose sizes are not: another reduction.
            _check_unclipped(transition, norm(raw_gradient), unclipped_norm, allowed=allowed)
        if transition.step.index == 0:
            try_derivatives(transition, state)
            _warn_of_values_outside_torch(transition.task)


def _check_unclipped(transition: Transition, ours: float, theirs: float, *, allowed: float) -> None:
    """Compare the norms of a gradient before clipping.

    Raises:
        UnexplainedGradient: they differ.
    """
    off = abs(ours - theirs) / max(ours, theirs)
    if not off <= allowed:
        raise UnexplainedGradient(
            transition.step.index,
            off,
            allowed,
            ours=ours,
            theirs=theirs,
            clipped=False,
            patched=transition.task.patched_modules,
        )


def try_derivatives(transition: Transition, state: State) -> None:
    """Differentiate a step's gradient once, as an attribution will, on as few rows as possible.

    A model that cannot be differentiated would otherwise be noticed after the training.

    Raises:
        NoDerivative: neither derivatives nor differences of its gradient can be taken.
    """
    micro_batch = next(part for part in transition.micro_batches() if part.contributes)
    few: MicroBatch | None = None
    if len(micro_batch.share) > ROWS_TRIED:
        try:
            few = micro_batch.select_slots(torch.arange(ROWS_TRIED))
        except NotCut:
            few = None
    ways = [gradient_vjp, gradient_vjp_by_differences]
    errors: list[Exception] = []
    # A loss may need the whole batch (pairs of rows, say), so that is what decides.
    for part in [few, micro_batch]:
        for way in ways:
            if part is None:
                continue
            try:
                _differentiate(way, part, state)
            except (BacktrailError, torch.OutOfMemoryError):
                return
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                errors.append(error)
            else:
                return
    raise NoDerivative(errors[-2], errors[-1]) from errors[-1]


def _differentiate(way: DerivativeOfGradient, part: MicroBatch, state: State) -> None:
    like = next(iter(state.params.values()))
    ones = torch.ones(len(part.share)).to(like)
    with part.transition.replaying(double_backward=way is gradient_vjp):
        found = way(part, state.params, state.buffers, weights=ones)
        found.vjp(found.gradient, {})


def default_gradient_tolerance(step: Step, consumed: Tree) -> float:
    """Allowed relative difference of a gradient, by precision.

    An eager model is reproduced bit for bit. A compiled one uses other kernels, which round
    differently.
    """
    if all(gradient.dtype == torch.float64 for gradient in consumed.values()):
        return 1e-9
    return AUTOCAST if step.autocast else 1e-3


def change_by_clipping(raw: Tree, clipped: Tree) -> float:
    """By how much clipping changed a gradient (relative)."""
    gap = norm({name: raw[name] - clipped[name] for name in raw})
    return gap / max(norm(raw), 1e-30)


def called_by_scaler() -> bool:
    """Whether the optimizer's step that is running was called by a `GradScaler`.

    Neither the optimizer nor its gradients tell: unscaling is not counted as a write.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == grad_scaler.__file__:
            return True
        frame = frame.f_back
    return False


def reread_batch(task: Task, step: int, live: LiveBatch) -> Batch:
    """Return the batch as a replay will get it, on the task's device.

    Raises:
        UnrepeatableRows: its rows read differently the second time.
    """
    if live.content is not None:
        return cast(live.content, None, task.device)
    batch = task.batch(live.samples)
    if digest(batch) != live.digest:
        raise UnrepeatableRows(step, live.samples)
    return cast(batch, None, task.device)


def _warn_of_values_outside_torch(task: Task) -> None:
    """Warn of a forward pass that takes values out of torch, whose derivative nobody knows."""
    calls = ", ".join(task.binding.left_torch)
    if calls:
        log.warning(
            "The forward pass takes values that depend on the parameters out of torch (%s). "
            "Influence holds what is computed from them constant. That is right for logging and "
            "for choices; values that are written to a buffer or multiplied with should stay "
            "tensors.",
            calls,
        )


def _check_losses(transition: Transition, state: State) -> None:
    """Check that the loss gives one value per slot.

    A loss of the whole batch is checked when it is first computed.

    Otherwise the first error would be a mismatch of shapes deep inside the replay.

    Raises:
        BadLoss: it gives another number of values.
    """
    if transition.task.total is not None:
        return
    with transition.replaying():
        losses, _ = transition.task.losses(state.params, state.buffers, transition.batches[0])
    rows = len(transition.step.fed[0].samples)
    if len(losses) != rows:
        raise BadLoss(f"{len(losses)} values for the {rows} rows of a batch")
