"""What the update makes of gradients, asked as soon as they are there: what waits for it need not wait for the step.

It is a guess that the gradient and the settings stay as they are until the step. Where they do not
(gradients are accumulated, or a schedule acts in between), that shows at the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from backtrail.methods.dve.step_features import StepFeatures
from backtrail.optim.steady_state import Lasting
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.tree import Tree

ENTRIES, BYTES = 2**18, 2**23  # of gradients, or of what waits for them, that are worth a call
Now = Callable[[], tuple[Update, State]]


@final
@dataclass(slots=True)
class Early:
    """The answers for a coming step.

    Args:
        what: is wanted of it.
        now: the update and the state as they are.
    """

    what: StepFeatures
    now: Now
    _ready: Tree = field(default_factory=dict)  # gradients without an answer
    _versions: dict[str, tuple[Tensor, int]] = field(
        default_factory=dict
    )  # of all that arrived, when they did
    _update: Update | None = None
    _answer: Lasting = field(default_factory=lambda: Lasting({}, {}))
    _wrong: bool = False

    def arrived(self, name: str, gradient: Tensor, *, waiting: int) -> Tree:
        """Take note of a parameter's gradient; now and then, how far the update moves the last ones, `Lasting.rate`.

        Args:
            name: of the parameter.
            gradient: of the loss.
            waiting: bytes that wait.
        """
        self._wrong = self._wrong or name in self._versions
        self._versions[name] = gradient, gradient._version
        self._ready[name] = gradient
        entries = sum(tensor.numel() for tensor in self._ready.values())
        if self._wrong or (entries < ENTRIES and waiting < BYTES):
            return {}
        update, state = self.now()
        self._wrong = self._update not in (None, update)
        ready, self._ready, self._update = self._ready, {}, update
        response = self.what.response(update, state, ready)
        self._answer = self._answer | response
        return response.rate

    def taken(self, update: Update, gradient: Tree) -> Lasting | None:
        """The answers so far, at the step; None where the guess was wrong. The next step starts anew."""
        response, right = self._answer, not self._wrong and self._update in (None, update)
        right = right and all(
            gradient.get(n) is g and g._version == seen for n, (g, seen) in self._versions.items()
        )
        self._ready, self._versions, self._update, self._wrong = {}, {}, None, False
        self._answer = Lasting({}, {})
        return response if right else None
