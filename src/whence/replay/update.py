r"""One optimizer update as a function of plain tensors, and its exact derivative.

Every optimizer accepted here changes each entry of a parameter by a function of that entry, its moments and its
gradient alone. So the Jacobian of the update is diagonal: one number per entry for each pair (output, input). It is
computed once a step by `torch.optim` itself, built with `differentiable=True`, and then applied to any number of
cotangents by multiplication. No optimizer formula is written down in this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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

from whence.errors import UnsupportedOptimizer
from whence.replay.state import COUNTS, Setting, State, elementwise
from whence.tree import Tree

SUPPORTED: dict[str, type[Optimizer]] = {
    kind.__name__: kind for kind in (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Adamax, ASGD)
}
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})
PORTION_BYTES = 16 * 2**20  # of parameters whose Jacobian exists at once
ROWS_BYTES = 8 * 2**20  # of cotangents that exist twice
PARAMETER, GRADIENT = "parameter", "gradient"  # beside the optimizer's own keys, which never have these names


def supported(optimizer: type[Optimizer]) -> str:
    """The name of a supported optimizer class.

    Raises:
        UnsupportedOptimizer: with the reason.
    """
    name = optimizer.__name__
    if SUPPORTED.get(name) is optimizer:
        return name
    if issubclass(optimizer, Rprop):
        raise UnsupportedOptimizer(name, "it sees only the signs of gradients, so every influence is identically zero")
    raise UnsupportedOptimizer(name, "it has no elementwise mode with differentiable=True in torch.optim")


@final
@dataclass(frozen=True, slots=True)
class Jacobian:
    """Derivative of an update, entry by entry: `entries[parameter][output, input]`."""

    entries: dict[str, dict[tuple[str, str], Tensor]]

    def pull(self, params: Tree, moments: dict[str, Tree]) -> tuple[dict[str, Tree], Tree]:
        """Transposed product with the cotangents after the update, which may carry leading axes, `[query, *shape]`.

        The given tensors are overwritten with the cotangents before the update; their moments, and the cotangents of
        the gradients, are returned. So never more than a few queries' cotangents exist twice.
        """
        before: dict[str, Tree] = {}
        grads: Tree = {}
        for name, entries in self.entries.items():
            after = {PARAMETER: params[name]} | moments.get(name, {})
            grads[name] = _pull(entries, after)
            sources = {source for _, source in entries}
            before[name] = {key: tensor for key, tensor in after.items() if key in sources and key != PARAMETER}
        return before, grads


def _pull(entries: dict[tuple[str, str], Tensor], after: Tree) -> Tensor:
    """Overwrite the cotangents of one parameter's update by those before it; return that of its gradient."""
    parameter = after[PARAMETER]
    gradient = torch.empty_like(parameter)
    rows = max(1, ROWS_BYTES // (parameter[0].nbytes + 1))
    for first in range(0, len(parameter), rows):
        part = {key: tensor[first : first + rows] for key, tensor in after.items()}
        pulled = _pull_rows(entries, part)
        gradient[first : first + rows] = pulled.pop(GRADIENT)
        for key, tensor in pulled.items():
            part[key].copy_(tensor)
    return gradient


def _pull_rows(entries: dict[tuple[str, str], Tensor], after: Tree) -> Tree:
    pulled: Tree = {}
    for (output, source), entry in entries.items():
        if output not in after:
            continue  # a moment that no later state reads
        if source in pulled:
            pulled[source] = pulled[source].addcmul_(entry, after[output])
        else:
            pulled[source] = entry * after[output]
    return pulled


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
            params, moments = self._run(state.params, state.moments, grads, differentiable=False)
        return State(
            state.params | {name: params[name] for name in names},
            state.buffers,
            state.moments | {name: moments[name] for name in names},
        )

    def pull(
        self, state: State, grads: Tree, *, params: Tree, moments: dict[str, Tree]
    ) -> tuple[Tree, dict[str, Tree], Tree]:
        """Take the cotangents of the state after the update back: of parameters, of moments, and of the gradient.

        Args:
            state: before the update.
            grads: the gradient that the update consumed.
            params: cotangents after the update, `[query, *shape]`; overwritten.
            moments: likewise; parameters without gradient pass unchanged.
        """
        moments, pulled = dict(moments), dict[str, Tensor]()
        for names in portions(grads):
            jacobian = self.jacobian(state, {name: grads[name] for name in names})
            before, some = jacobian.pull(params, moments)
            moments |= before
            pulled |= some
        return params, moments, pulled

    def jacobian(self, state: State, grads: Tree) -> Jacobian:
        """The derivative of every output entry with respect to every input entry, at unstacked tensors."""
        leaves = {name: _leaves(state, grads[name], name) for name in grads}
        # A fresh optimizer makes its moments in its first step, so it is asked for them.
        fresh = {name: grad for name, grad in grads.items() if not state.moments.get(name)}
        moments = state.moments | (self(state, fresh).moments if fresh else {})
        dead = {name: _never_moved(moments[name], grad) for name, grad in grads.items() if name in moments}
        with torch.enable_grad():
            params, moments = self._traced(state, leaves, dead)
            outputs = {name: {PARAMETER: params[name]} | moments[name] for name in grads}
            return Jacobian(_diagonals(outputs, leaves))

    def _traced(
        self, state: State, leaves: dict[str, Tree], dead: dict[str, Tensor | None]
    ) -> tuple[Tree, dict[str, Tree]]:
        """The update as a graph over the leaves, with the two guards where torch.optim has no derivative."""
        guarded = {name: _revive(tree, dead.get(name)) for name, tree in leaves.items()}
        params = {name: tree.pop(PARAMETER) for name, tree in guarded.items()}
        grads = {name: tree.pop(GRADIENT) for name, tree in guarded.items()}
        moments = {name: _exact_counts(state.moments.get(name, {})) | tree for name, tree in guarded.items()}
        for name in self._first_momentum(moments):
            moments[name] = {"momentum_buffer": self._momentum_before(name, params[name], grads[name])}
        # ASGD overwrites its own counts after using them, so what the graph keeps of them must be copies.
        copies = saved_tensors_hooks(lambda t: t.clone() if t.dim() == 0 else t, lambda t: t)
        with _default_dtype(torch.float64), copies:
            params, moments = self._run(params, moments, grads, differentiable=True)
        return params, {name: _bury(tree, dead.get(name)) for name, tree in moments.items()}

    def _first_momentum(self, moments: dict[str, Tree]) -> list[str]:
        if self.optimizer != "SGD":
            return []
        return [name for name, tree in moments.items() if not tree and self._setting(name)["momentum"]]

    def _momentum_before(self, name: str, parameter: Tensor, grad: Tensor) -> Tensor:
        """A buffer b with momentum * b + (1 - dampening) * g = g.

        torch makes SGD's first buffer by `grad.detach().clone()`, which loses that step's derivative. Started from b,
        the ordinary formula gives the same buffer and keeps the derivative.
        """
        setting: dict[str, float] = self._setting(name)  # type: ignore[assignment]
        used = (-grad if setting["maximize"] else grad) + setting["weight_decay"] * parameter
        return used * (setting["dampening"] / setting["momentum"])

    def _setting(self, name: str) -> dict[str, Setting]:
        return next(s for group, s in zip(self.groups, self.settings, strict=True) if name in group)

    def _run(
        self, params: Tree, moments: dict[str, Tree], grads: Tree, *, differentiable: bool
    ) -> tuple[Tree, dict[str, Tree]]:
        """One `step()` of a fresh torch.optim object on clones."""
        moved = {name: params[name].clone() for name in grads}
        mode = {"differentiable": differentiable, "foreach": False, "capturable": False, "fused": None}
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
                optimizer.state[parameter] = {key: tensor.clone() for key, tensor in moments[name].items()}
        optimizer.step()
        return moved, {name: tensors_of(optimizer.state[parameter]) for name, parameter in moved.items()}


def portions(grads: Tree) -> Iterator[list[str]]:
    """Parameters in groups of about equal size: a Jacobian takes some twenty times the memory of its parameters."""
    names: list[str] = []
    size = 0
    for name, grad in grads.items():
        if names and size + grad.nbytes > PORTION_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += grad.nbytes
    if names:
        yield names


def tensors_of(state: dict[str, Any]) -> Tree:
    """The tensors of one parameter's optimizer state."""
    return {
        key: value.detach() if not value.requires_grad else value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let torch.optim make its step counts in this precision.

    With differentiable=True it raises the decay rates to the power of the count as a tensor, and 1 - 0.999 ** t in
    float32 is off by 1e-5.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _exact_counts(moments: Tree) -> Tree:
    return {key: tensor.double() if key in COUNTS else tensor for key, tensor in moments.items()}


def _leaves(state: State, grad: Tensor, name: str) -> Tree:
    """The differentiable inputs of one parameter's update, as leaves of a fresh graph."""
    moments = state.moments.get(name, {})
    values = {key: moments[key] for key in elementwise(moments, state.params[name])}
    values |= {PARAMETER: state.params[name], GRADIENT: grad}
    return {key: value.detach().clone().requires_grad_() for key, value in values.items()}


def _never_moved(moments: Tree, grad: Tensor) -> Tensor | None:
    """Entries whose second moment is zero and stays so with this gradient; None where there are none.

    Adam divides by sqrt(v); at v = 0 autograd returns NaN. Such an entry never received a gradient (dead unit, unused
    embedding row), so its derivative is defined through v = 1, g = 0: see `_revive` and `_bury`.
    """
    seconds = [moments[key] for key in moments if key in SECOND_MOMENTS]
    if not seconds:
        return None
    # A square below the smallest normal number counts as zero: it may vanish when it is added to the moment.
    square = grad.square()
    dead = torch.stack([(second == 0) & (square < torch.finfo(square.dtype).tiny) for second in seconds]).any(0)
    return dead if bool(dead.any()) else None


def _revive(inputs: Tree, dead: Tensor | None) -> Tree:
    if dead is None:
        return dict(inputs)
    safe = dict.fromkeys(SECOND_MOMENTS, 1.0) | {GRADIENT: 0.0}
    return {key: torch.where(dead, safe[key], value) if key in safe else value for key, value in inputs.items()}


def _bury(outputs: Tree, dead: Tensor | None) -> Tree:
    if dead is None:
        return outputs
    return {key: torch.where(dead, 0.0, m) if key in SECOND_MOMENTS else m for key, m in outputs.items()}


def _diagonals(outputs: dict[str, Tree], leaves: dict[str, Tree]) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Derivatives by one backward pass per kind of output: the gradient of an elementwise map's sum is its diagonal."""
    entries: dict[str, dict[tuple[str, str], Tensor]] = {name: {} for name in leaves}
    sources = [(name, key) for name, tree in leaves.items() for key in tree]
    for output in sorted({key for tree in outputs.values() for key in tree}):
        traced = [tree[output] for tree in outputs.values() if output in tree and tree[output].requires_grad]
        if not traced:
            continue
        inputs = [leaves[name][key] for name, key in sources]
        grads = torch.autograd.grad(
            [t.sum() for t in traced], inputs, retain_graph=True, allow_unused=True, materialize_grads=False
        )
        for (name, key), grad in zip(sources, grads, strict=True):
            if grad is not None:
                entries[name][output, key] = grad
    return entries
