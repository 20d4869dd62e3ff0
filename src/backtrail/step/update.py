"""One optimizer update as a function of plain tensors. No optimizer formula is written down in this file.

Every optimizer accepted here changes each entry of a parameter by a function of that entry, its
moments and its gradient alone. So stacks of states are updated like one, and parameters may be cut
and joined at will: its derivative (`jacobian.py`) makes use of both.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from backtrail.errors import UnsupportedOptimizer
from backtrail.step.state import Setting, State
from backtrail.tree import Tree

SUPPORTED: dict[str, type[Optimizer]] = {
    kind.__name__: kind
    for kind in (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Adamax, ASGD)
}

LINEAR = frozenset({"SGD", "ASGD"})  # without a bend: their derivative is the same everywhere


def supported(optimizer: type[Optimizer]) -> str:
    """The name of a supported optimizer class.

    Raises:
        UnsupportedOptimizer: with the reason.
    """
    name = optimizer.__name__
    if SUPPORTED.get(name) is optimizer:
        return name
    if issubclass(optimizer, Rprop):
        raise UnsupportedOptimizer(
            name, "it sees only the signs of gradients, so every influence is identically zero"
        )
    raise UnsupportedOptimizer(
        name, "it has no elementwise mode with differentiable=True in torch.optim"
    )


@final
@dataclass(frozen=True, slots=True)
class Update:
    """U of one step: which optimizer, over which groups of parameters, with which hyperparameters."""

    optimizer: str
    groups: tuple[tuple[str, ...], ...]
    settings: tuple[dict[str, Setting], ...]

    def __call__(self, state: State, grads: Tree) -> State:
        """The state after the update; buffers are passed on. Parameters without gradient stay as they are.

        Works on stacked states as well (`State.repeat`), because the update is elementwise.
        """
        names = list(grads)
        with torch.no_grad():
            params, moments = self.run(state.params, state.moments, grads, differentiable=False)
        return State(
            state.params | {name: params[name] for name in names},
            state.buffers,
            state.moments | {name: moments[name] for name in names},
        )

    def run(
        self, params: Tree, moments: dict[str, Tree], grads: Tree, *, differentiable: bool
    ) -> tuple[Tree, dict[str, Tree]]:
        """One `step()` of a fresh torch.optim object on clones: parameters and moments after it, traced or not."""
        moved = {name: params[name].clone() for name in grads}
        mode = {
            "differentiable": differentiable,
            "foreach": False,
            "capturable": False,
            "fused": None,
        }
        groups = [
            setting
            | {key: mode[key] for key in mode if key in setting}
            | {"params": [moved[n] for n in group if n in moved]}
            for group, setting in zip(self.groups, self.settings, strict=True)
        ]
        optimizer = SUPPORTED[self.optimizer](groups, differentiable=differentiable)  # type: ignore[call-arg]
        for name, parameter in moved.items():
            parameter.grad = grads[name]
            if moments.get(name):
                optimizer.state[parameter] = {
                    key: tensor.clone() for key, tensor in moments[name].items()
                }
        optimizer.step()
        return moved, {
            name: tensors_of(optimizer.state[parameter]) for name, parameter in moved.items()
        }


def tensors_of(state: dict[str, Any]) -> Tree:
    """The tensors of one parameter's optimizer state."""
    return {
        key: value.detach() if not value.requires_grad else value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
