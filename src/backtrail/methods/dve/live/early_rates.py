"""What the update will make of gradients, computed as soon as they arrive in the backward pass.

Cotangents that wait for these rates can then be reduced before the step. It is a guess that
gradients and settings stay as they are until the step. Where they change (accumulation, or a
schedule that acts in between), that is noticed at the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from backtrail.methods.dve.step_features import StepFeatures
from backtrail.optim.steady_state import SteadyState
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.tree import Tree, count_writes

# Rates are computed when so many entries of gradients, or bytes of cotangents, wait for them.
WAITING_ENTRIES = 2**18
WAITING_BYTES = 2**23
Now = Callable[[], tuple[Update, State]]


@final
@dataclass(slots=True)
class Early:
    """The response of the update to the gradients of the coming step.

    Args:
        what: What is gathered of a step.
        now: Returns the update and the state as they are.
    """

    what: StepFeatures
    now: Now
    # Gradients without a response so far.
    _ready: Tree = field(default_factory=dict)
    # Every gradient that arrived, with its version counter at that time.
    _versions: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _update: Update | None = None
    _response: SteadyState = field(default_factory=lambda: SteadyState({}, {}))
    _wrong: bool = False

    def arrived(self, name: str, gradient: Tensor, *, waiting: int) -> Tree:
        """Note a parameter's gradient; return `SteadyState.rate` of the last ones, if many wait.

        Args:
            name: Of the parameter.
            gradient: Of the loss by it.
            waiting: Bytes of cotangents that wait for rates.
        """
        # A second gradient of one parameter: it accumulates, so that the first guess was wrong.
        if name in self._versions:
            self._wrong = True
        self._versions[name] = gradient, count_writes(gradient)
        self._ready[name] = gradient
        entries = sum(tensor.numel() for tensor in self._ready.values())
        is_early = entries < WAITING_ENTRIES and waiting < WAITING_BYTES
        if self._wrong or is_early:
            return {}
        update, state = self.now()
        self._wrong = self._update not in (None, update)
        self._update = update
        ready = self._ready
        self._ready = {}
        response = self.what.response(update, state, ready)
        self._response = self._response | response
        return response.rate

    def taken(self, update: Update, gradient: Tree) -> SteadyState | None:
        """Take the response so far, at the step; None where the guess was wrong.

        Args:
            update: Of the step.
            gradient: Of the step, before clipping.
        """
        is_right = not self._wrong and self._update in (None, update)
        for name, (tensor, version) in self._versions.items():
            if gradient.get(name) is not tensor or count_writes(tensor) != version:
                is_right = False
        response = self._response
        self._ready = {}
        self._versions = {}
        self._update = None
        self._wrong = False
        self._response = SteadyState({}, {})
        return response if is_right else None
