"""One optimizer update as a function of plain tensors, computed by `torch.optim`.

Every optimizer in the table of `optimizers.py` changes each entry of a parameter by a function of
that entry, its moments and its gradient alone. So a stack of states is updated like one state, and
parameters may be cut and joined at will; the derivative (`optim/jacobian.py`) makes use of both.
"""

from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from backtrail.step.optimizers import rule_named
from backtrail.step.state import Setting, State
from backtrail.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Update:
    """The update U of one step.

    Attributes:
        optimizer: Name of the optimizer's class, a key of `backtrail.step.optimizers.RULES`.
        groups: Names of the parameters of every parameter group.
        settings: Hyperparameters of every parameter group.
        cancelled: Masks of entries whose gradient at the first step is zero, but is not with other
            weights of the samples; by parameter. Only derivatives read them.
        zero_factor: The same for entries whose gradient is not zero with other parameters.
    """

    optimizer: str
    groups: tuple[tuple[str, ...], ...]
    settings: tuple[dict[str, Setting], ...]
    cancelled: Tree = field(default_factory=dict)
    zero_factor: Tree = field(default_factory=dict)

    def __call__(self, state: State, grads: Tree) -> State:
        """Compute the state after the update; buffers are passed on unchanged.

        Parameters without a gradient stay as they are. Stacked states (`State.repeat`) are updated
        in one call, because the update is elementwise.
        """
        with torch.no_grad():
            params, moments = self.run(state.params, state.moments, grads, differentiable=False)
        return State(state.params | params, state.buffers, state.moments | moments)

    def run(
        self, params: Tree, moments: dict[str, Tree], grads: Tree, *, differentiable: bool
    ) -> tuple[Tree, dict[str, Tree]]:
        """Call `step()` of a new torch.optim object on clones of the parameters with a gradient.

        Returns:
            Their values and their moments after the step, with a graph if `differentiable`.
        """
        updated = {name: params[name].clone() for name in grads}
        optimizer = self._optimizer(updated, differentiable=differentiable)
        for name, parameter in updated.items():
            parameter.grad = grads[name]
            before = moments.get(name)
            if before:
                # The optimizer writes to its state in place.
                clones = {key: tensor.clone() for key, tensor in before.items()}
                optimizer.state[parameter] = clones
        optimizer.step()
        after = {name: tensors_of(optimizer.state[updated[name]]) for name in updated}
        return updated, after

    def _optimizer(self, updated: Tree, *, differentiable: bool) -> torch.optim.Optimizer:
        """Make an optimizer over tensors with the settings of this update."""
        # The recorded settings also say which implementation ran. Replays use the plain loop over
        # parameters, the only one that can be differentiated and the same on every device.
        implementation = {
            "differentiable": differentiable,
            "foreach": False,
            "capturable": False,
            "fused": None,
        }
        groups: list[dict[str, Any]] = []
        for members, settings in zip(self.groups, self.settings, strict=True):
            chosen = {key: implementation[key] for key in implementation if key in settings}
            tensors = [updated[name] for name in members if name in updated]
            groups.append(settings | chosen | {"params": tensors})
        optimizer_class: Any = rule_named(self.optimizer).optimizer_class
        optimizer: torch.optim.Optimizer = optimizer_class(groups, differentiable=differentiable)
        return optimizer


def tensors_of(state: dict[str, Any]) -> Tree:
    """Pick the tensors of one parameter's optimizer state, detached unless they have a graph."""
    tensors: Tree = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value if value.requires_grad else value.detach()
    return tensors
