"""The recorder's proof: what it notes explains the gradient that the loop handed to the optimizer."""

from whence.errors import UnexplainedGradient
from whence.replay.state import State
from whence.replay.transition import Transition
from whence.tree import Tree, norm

MOST_NEW = 8  # shapes of step that are proved when first met


class Proof:
    """Decides when to prove a step, and proves it."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._met: set[object] = set()

    def due(self, step: int, shape: object) -> bool:
        """The first two steps, then at powers of four, and steps of a shape not met before (sizes, modes, idle)."""
        new = shape not in self._met and len(self._met) < MOST_NEW
        self._met.add(shape) if new else None
        return new or step < 2 or (step & (step - 1) == 0 and step.bit_length() % 2 == 1)

    def check(self, transition: Transition, state: State, consumed: Tree) -> None:
        """Compute the step's gradient as a replay will, and compare it with the one that the optimizer consumes.

        Raises:
            UnexplainedGradient: they differ.
        """
        grads, _, _ = transition.raw_gradient(state)
        ours = transition.clipped(grads)
        gap = norm({name: ours[name] - consumed[name] for name in ours})
        off = gap / max(norm(consumed), norm(ours), 1e-30)
        if not off <= self._tolerance:
            raise UnexplainedGradient(transition.step.index, off, self._tolerance, norm(ours), norm(consumed))
