"""The recorder's proof: what it notes explains the gradient that the loop handed to the optimizer."""

import torch

from backtrail.errors import BadLoss, UnexplainedGradient, UnrepeatableRows
from backtrail.record.backward_hooks import LiveBatch
from backtrail.run.run import AUTOCAST
from backtrail.run.tensors import digest
from backtrail.step.state import State, Step, due
from backtrail.step.step import Transition
from backtrail.task.task import Batch, Task
from backtrail.tree import Tree, cast, norm

MOST_NEW = 8  # shapes of step that are proved when first met


class Proof:
    """Decides when to prove a step, and proves it."""

    def __init__(self, tolerance: float | None) -> None:
        self._tolerance = tolerance
        self._met: set[object] = set()

    def due(self, step: Step) -> bool:
        """The first two steps, then at powers of four, and steps of a shape not met before (sizes, modes, idle)."""
        shape = (
            tuple((len(fed.samples), fed.contributes) for fed in step.fed),
            step.unused,
            step.evaluating,
            step.autocast,
        )
        new = shape not in self._met and len(self._met) < MOST_NEW
        if new:
            self._met.add(shape)
        return new or due(step.index)

    def tolerance(self, step: Step, consumed: Tree) -> float:
        """The relative difference that is allowed."""
        return self._tolerance or default_tolerance(step, consumed)

    def check(self, transition: Transition, state: State, consumed: Tree) -> None:
        """Compute the step's gradient as a replay will, and compare it with the one that the optimizer consumes.

        Raises:
            UnexplainedGradient: they differ.
        """
        if transition.step.index == 0:
            _check_losses(transition, state)
        grads, _, _ = transition.raw_gradient(state)
        ours = transition.clipped(grads)
        gap = norm({name: ours[name] - consumed[name] for name in ours})
        off = gap / max(norm(consumed), norm(ours), 1e-30)
        allowed = self.tolerance(transition.step, consumed)
        if not off <= allowed:
            norms = {"ours": norm(ours), "theirs": norm(consumed)}
            raise UnexplainedGradient(transition.step.index, off, allowed, **norms)


def default_tolerance(step: Step, consumed: Tree) -> float:
    """How far a gradient may be off: an eager model's is met to the bit, and other kernels round in other places."""
    if all(gradient.dtype == torch.float64 for gradient in consumed.values()):
        return 1e-9
    return AUTOCAST if step.autocast else 1e-3


def read_again(task: Task, step: int, fed: LiveBatch) -> Batch:
    """What a replay will read where the loop was fed this batch.

    Raises:
        UnrepeatableRows: the rows do not read the same again.
    """
    if fed.content is not None:
        return cast(fed.content, None, task.device)
    batch = task.batch(fed.samples)
    if digest(batch) != fed.digest:
        raise UnrepeatableRows(step, fed.samples)
    return cast(batch, None, task.device)


def _check_losses(transition: Transition, state: State) -> None:
    """One value per slot: said once, before the shapes of the user's tensors clash somewhere deep.

    Raises:
        BadLoss: another number of values.
    """
    with transition.replaying():
        losses, _ = transition.task.losses(state.params, state.buffers, transition.batches[0])
    rows = len(transition.step.fed[0].samples)
    if len(losses) != rows:
        raise BadLoss(f"{len(losses)} values for the {rows} rows of a batch")
