r"""The exact derivative of an optimizer's update, by `torch.optim` itself, built with `differentiable=True`.

The update is elementwise, so its Jacobian is diagonal: one number per entry for each pair (output,
input). It is computed once a step, strand by strand, and then applied to any number of cotangents
by multiplication.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from backtrail.optim.flatten import FlatChunk
from backtrail.step.state import COUNTS, State, elementwise
from backtrail.step.update import Update
from backtrail.tree import Tree

Entries = dict[tuple[str, str], Tensor]  # (output, input) -> derivative, one number per entry

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})
ROWS_BYTES = 8 * 2**20  # of cotangents that exist twice
PARAMETER, GRADIENT = (
    "parameter",
    "gradient",
)  # beside the optimizer's own keys, which never have these names


def pull_update(
    slopes: Iterable[tuple[FlatChunk, Entries]],
    names: Iterable[str],
    *,
    params: Tree,
    moments: dict[str, Tree],
) -> tuple[dict[str, Tree], Tree]:
    """Take the cotangents of the state after an update back: of the moments, and of the gradient.

    Args:
        slopes: the update's derivative, strand by strand.
        names: the parameters that it moves.
        params: contiguous cotangents after it, `[query, *shape]`; overwritten with those before it.
        moments: likewise; those of parameters without gradient pass unchanged.
    """
    before: dict[str, Tree] = {}
    pulled = {name: torch.empty_like(params[name]) for name in names}
    for chunk, entries in slopes:
        read = {source for _, source in entries}
        for span, place in chunk.parts():
            after = moments.get(span.name, {})
            before[span.name] = {key: tensor for key, tensor in after.items() if key in read}
            views = {key: span.of(tensor) for key, tensor in after.items()} | {
                PARAMETER: span.of(params[span.name])
            }
            _pull(
                {key: entry[place] for key, entry in entries.items()},
                views,
                gradient=span.of(pulled[span.name]),
            )
    return moments | before, pulled


def _pull(entries: Entries, after: Tree, *, gradient: Tensor) -> None:
    """Overwrite the cotangents `[query, entry]` after the update by those before it, a few queries at a time."""
    rows = max(1, ROWS_BYTES // gradient[0].nbytes)
    for first in range(0, len(gradient), rows):
        part = {key: tensor[first : first + rows] for key, tensor in after.items()}
        pulled = _products(entries, part)
        gradient[first : first + rows] = pulled.pop(GRADIENT)
        for key, tensor in pulled.items():
            part[key].copy_(tensor)


def _products(entries: Entries, after: Tree) -> Tree:
    pulled: Tree = {}
    for (output, source), entry in entries.items():
        if output not in after:
            continue  # a moment that no later state reads
        if source in pulled:
            pulled[source] = pulled[source].addcmul_(entry, after[output])
        else:
            pulled[source] = entry * after[output]
    return pulled


def jacobian(
    update: Update,
    state: State,
    grads: Tree,
    *,
    chunk: FlatChunk,
    held: frozenset[str] = frozenset(),
) -> Entries:
    """The derivative of every output of the update by every input, at a strand's entries.

    Outputs are `PARAMETER` and the optimizer's elementwise moments, inputs the same and `GRADIENT`.
    Pairs that are zero everywhere may be missing.

    Args:
        update: the step's.
        state: before it.
        grads: what the optimizer consumes.
        chunk: where.
        held: moments that count as constants, as the update leaves them.
    """
    alone, inputs, counts = alone_at(update, state, grads, chunk=chunk)
    dead = _never_moved(alone, inputs, counts)
    with torch.enable_grad():
        leaves = {key: tensor.requires_grad_() for key, tensor in inputs.items() if key not in held}
        with _Holding() if held else nullcontext():
            outputs = _traced(alone, _revive(inputs | leaves, dead), counts)
        return _diagonals(_bury(outputs, dead), leaves)


class _Holding(TorchFunctionMode):
    """What has no derivative gets none by being updated in place."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that overwrites a constant, as if all were constants."""
        name = getattr(function, "__name__", "")
        overwrites = name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor)
        with torch.no_grad() if overwrites and not args[0].requires_grad else nullcontext():
            return function(*args, **kwargs or {})


def alone_at(
    update: Update, state: State, grads: Tree, *, chunk: FlatChunk
) -> tuple[Update, Tree, Tree]:
    """A strand as the one parameter of an optimizer: its update, the inputs `[entry]`, and the step counts."""
    first = chunk.spans[0].name
    old = state.moments.get(first, {})
    keys = elementwise(old, state.params[first])
    inputs = {
        key: chunk.gather({span.name: state.moments[span.name][key] for span in chunk.spans})
        for key in keys
    }
    inputs |= {PARAMETER: chunk.gather(state.params), GRADIENT: chunk.gather(grads)}
    # In float32, 1 - 0.999 ** t is off by 1e-5.
    counts = {key: tensor.double() for key, tensor in old.items() if key in COUNTS}
    return (
        Update(update.optimizer, ((PARAMETER,),), (update.settings[chunk.group],)),
        inputs,
        counts,
    )


def _traced(alone: Update, inputs: Tree, counts: Tree) -> Tree:
    """Parameter and moments after the update, as a graph over the inputs."""
    moments = _moments(inputs, counts)
    if not moments:
        moments = _first_moments(alone, inputs)
    # ASGD overwrites its own counts after using them, so what the graph keeps of them must be
    # copies. And a graph whose kept tensors hold the graph would never be freed.
    copies = saved_tensors_hooks(lambda t: t.clone() if t.dim() == 0 else t.detach(), lambda t: t)
    with copies:
        return _step(alone, inputs, moments, differentiable=True)


def moved(alone: Update, inputs: Tree, counts: Tree) -> Tree:
    """Parameter and moments after the update, as numbers."""
    with torch.no_grad():
        return _step(alone, inputs, _moments(inputs, counts), differentiable=False)


def _step(alone: Update, inputs: Tree, moments: Tree, *, differentiable: bool) -> Tree:
    params, after = alone.run(
        {PARAMETER: inputs[PARAMETER]},
        {PARAMETER: moments},
        {PARAMETER: inputs[GRADIENT]},
        differentiable=differentiable,
    )
    return after[PARAMETER] | {PARAMETER: params[PARAMETER]}


def _moments(inputs: Tree, counts: Tree) -> Tree:
    return counts | {
        key: tensor for key, tensor in inputs.items() if key not in {PARAMETER, GRADIENT}
    }


def _first_moments(alone: Update, inputs: Tree) -> Tree:
    """Moments that a new optimizer starts from, with its step counts in float64.

    A new optimizer makes its counts in the default dtype. In float32, 1 - 0.999 ** t is off by
    1e-5, and the default dtype belongs to the whole process: another thread would create tensors
    with it. So the counts are made here and handed over.
    """
    setting = alone.settings[0]
    if alone.optimizer == "SGD":
        momentum = setting["momentum"]
        return {"momentum_buffer": _momentum_before(setting, inputs)} if momentum else {}  # type: ignore[arg-type]
    first: dict[str, Any] = {
        "mu": 1.0,
        "mu_product": 1.0,
        "eta": setting["lr"],
        "sum": setting.get("initial_accumulator_value", 0.0),
    }
    # One step tells which moments this optimizer has; their values after it are not used.
    after = moved(alone, inputs, {})
    del after[PARAMETER]
    return {
        key: torch.full_like(
            moment, first.get(key, 0.0), dtype=torch.float64 if key in COUNTS else None
        )
        for key, moment in after.items()
    }


def _momentum_before(setting: dict[str, float], inputs: Tree) -> Tensor:
    """A buffer b with momentum * b + (1 - dampening) * g = g.

    torch makes SGD's first buffer by `grad.detach().clone()`, which loses that step's derivative.
    Started from b, the ordinary formula gives the same buffer and keeps the derivative.
    """
    grad = -inputs[GRADIENT] if setting["maximize"] else inputs[GRADIENT]
    used = grad + setting["weight_decay"] * inputs[PARAMETER]
    return used * (setting["dampening"] / setting["momentum"])


def _never_moved(alone: Update, leaves: Tree, counts: Tree) -> Tensor | None:
    """Entries whose second moment is zero and stays so with this gradient; None where there are none.

    Adam divides by sqrt(v); at v = 0 autograd returns NaN. Such an entry never received a gradient
    (dead unit, unused embedding row), so its derivative is defined through v = 1, g = 0: see
    `_revive` and `_bury`.
    """
    moments = _moments(leaves, counts)
    if not moments:  # a fresh optimizer makes them in its first step, so it is asked for them
        moments = moved(alone, leaves, counts)
    seconds = [moments[key] for key in moments if key in SECOND_MOMENTS]
    if all(bool(second.amin() > 0) for second in seconds):
        return None
    # A square below the smallest normal number counts as zero: it may vanish when it is added to
    # the moment.
    square = leaves[GRADIENT].square()
    dead = torch.stack(
        [(second == 0) & (square < torch.finfo(square.dtype).tiny) for second in seconds]
    ).any(0)
    return dead if bool(dead.any()) else None


def _revive(inputs: Tree, dead: Tensor | None) -> Tree:
    if dead is None:
        return inputs
    safe = dict.fromkeys(SECOND_MOMENTS, 1.0) | {GRADIENT: 0.0}
    return {
        key: torch.where(dead, safe[key], value) if key in safe else value
        for key, value in inputs.items()
    }


def _bury(outputs: Tree, dead: Tensor | None) -> Tree:
    if dead is None:
        return outputs
    return {
        key: torch.where(dead, 0.0, m) if key in SECOND_MOMENTS else m for key, m in outputs.items()
    }


def _diagonals(outputs: Tree, leaves: Tree) -> Entries:
    """Derivatives by one backward pass per output: the gradient of an elementwise map's sum is its diagonal."""
    entries: Entries = {}
    for output, traced in sorted(outputs.items()):
        if not traced.requires_grad:
            continue
        found = torch.autograd.grad(
            traced.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        entries |= {
            (output, key): grad for key, grad in zip(leaves, found, strict=True) if grad is not None
        }
    return entries
