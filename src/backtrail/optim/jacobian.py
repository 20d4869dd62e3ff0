r"""The exact derivative of an optimizer's update, by `torch.optim` itself.

For one step with parameter θ, moments m and gradient g (METHODS: U the update, λ a cotangent),

.. math::
    (\theta', m') = U(\theta, m, g)
    \qquad
    (a_\theta, a_m, a_g) = U'^{\,\top}(\lambda_\theta, \lambda_m)

The optimizer is built with `differentiable=True`. Its update is elementwise, so the block of its
Jacobian for a pair (output, input) is diagonal: one number per entry. The diagonals are computed
once a step, chunk by chunk, and then applied to any number of cotangents by multiplication.

Where torch's differentiable mode fails, the derivative is completed here, and the value of the
update never changes:

* an entry whose second moment is zero (`_dead_entries`),
* the first momentum buffer of SGD (`OptimizerRule.differentiable_start`),
* step counts in float32 (`FlatUpdate.of`, `OptimizerRule.start`),
* a learning rate of 0 (`jacobian`).
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from backtrail.optim.flatten import FlatChunk
from backtrail.step.optimizers import OptimizerRule, rule_named
from backtrail.step.state import Setting, State, elementwise_keys
from backtrail.step.update import Update
from backtrail.tree import Tree

# (output, input) -> derivative [entry]. A pair that is zero everywhere may be missing.
Diagonals = dict[tuple[str, str], Tensor]

# Names of the parameter and the gradient beside the optimizer's own keys, which are never these.
PARAMETER = "parameter"
GRADIENT = "gradient"

# Bytes of cotangents that are held twice at a time, before and after the update.
BLOCK_BYTES = 8 * 2**20


def pull_update(
    derivatives: Iterable[tuple[FlatChunk, Diagonals]],
    names: Iterable[str],
    *,
    params: Tree,
    moments: dict[str, Tree],
) -> tuple[dict[str, Tree], Tree]:
    r"""Apply the VJP of an update to cotangents of the parameters and moments after it.

    Args:
        derivatives: The update's derivative, chunk by chunk.
        names: The parameters that it updates.
        params: :math:`\lambda_\theta`, contiguous, `[query, *shape]`; overwritten with
            :math:`a_\theta`.
        moments: :math:`\lambda_m`, likewise; those of parameters without a gradient are returned
            unchanged.

    Returns:
        The cotangents of the moments, :math:`a_m`, and of the gradient, :math:`a_g`.
    """
    before: dict[str, Tree] = {}
    grads = {name: torch.empty_like(params[name]) for name in names}
    for chunk, diagonals in derivatives:
        inputs = {source for _, source in diagonals}
        for part, place in chunk.parts():
            after = moments.get(part.name, {})
            # A moment that the update does not read has no cotangent before it.
            before[part.name] = {key: after[key] for key in after if key in inputs}
            views = {key: part.of(tensor) for key, tensor in after.items()}
            views[PARAMETER] = part.of(params[part.name])
            here = {pair: diagonal[place] for pair, diagonal in diagonals.items()}
            _pull_in_place(here, views, gradient=part.of(grads[part.name]))
    return moments | before, grads


def _pull_in_place(
    diagonals: Diagonals, cotangents: Tree, *, gradient: Float[Tensor, "query entry"]
) -> None:
    """Overwrite cotangents `[query, entry]` after the update with those before it.

    A few queries at a time, so that the memory in use does not double.
    """
    rows = max(1, BLOCK_BYTES // gradient[0].nbytes)
    for first in range(0, len(gradient), rows):
        block = {key: tensor[first : first + rows] for key, tensor in cotangents.items()}
        pulled = _products(diagonals, block)
        gradient[first : first + rows] = pulled.pop(GRADIENT)
        for key, tensor in pulled.items():
            block[key].copy_(tensor)


def _products(diagonals: Diagonals, after: Tree) -> Tree:
    r"""Sum :math:`\lambda_o\, \partial o / \partial i` over the outputs o, for every input i."""
    before: Tree = {}
    for (output, source), diagonal in diagonals.items():
        if output not in after:
            continue  # A moment that no later step reads.
        if source in before:
            before[source].addcmul_(diagonal, after[output])
        else:
            before[source] = diagonal * after[output]
    return before


@final
@dataclass(frozen=True, slots=True)
class FlatUpdate:
    """The update of one chunk, as that of an optimizer with a single flat parameter.

    Attributes:
        update: With `PARAMETER` as the only parameter.
        inputs: `PARAMETER`, `GRADIENT` and the elementwise moments before the step, `[entry]`.
        counts: The step counts before the step, in float64.
        cancelled: Where `Update.cancelled` or `Update.zero_factor` is true; None where nowhere.
    """

    update: Update
    inputs: Tree
    counts: Tree
    cancelled: Tensor | None = None

    @staticmethod
    def of(update: Update, state: State, grads: Tree, *, chunk: FlatChunk) -> "FlatUpdate":
        """Gather a chunk's entries of a state and of the gradient that the optimizer consumes."""
        # All parameters of a chunk have the same moments and counts.
        first = chunk.slices[0].name
        moments = state.moments.get(first, {})
        inputs: Tree = {}
        for key in elementwise_keys(moments, state.params[first]):
            inputs[key] = chunk.gather({s.name: state.moments[s.name][key] for s in chunk.slices})
        inputs[PARAMETER] = chunk.gather(state.params)
        inputs[GRADIENT] = chunk.gather(grads)
        rule = rule_named(update.optimizer)
        # In float32, Adam's 1 - 0.999 ** t is off by 1e-5.
        counts = {key: moments[key].double() for key in moments if key in rule.counts}
        alone = Update(update.optimizer, ((PARAMETER,),), (update.settings[chunk.group],))
        cancelled = None
        if update.cancelled or update.zero_factor:
            nowhere: Tree = {}
            for part in chunk.slices:
                nowhere[part.name] = torch.zeros_like(state.params[part.name], dtype=torch.bool)
            cancelled = chunk.gather(nowhere | update.cancelled)
            cancelled |= chunk.gather(nowhere | update.zero_factor)
        return FlatUpdate(alone, inputs, counts, cancelled)

    @property
    def rule(self) -> OptimizerRule:
        """What is known of the optimizer."""
        return rule_named(self.update.optimizer)

    @property
    def settings(self) -> dict[str, Setting]:
        """The hyperparameters of the chunk's parameter group."""
        return self.update.settings[0]

    def moments(self, inputs: Tree) -> Tree:
        """Pick moments and counts out of the inputs; empty before the optimizer's first step."""
        picked = {key: inputs[key] for key in inputs if key not in {PARAMETER, GRADIENT}}
        return self.counts | picked

    def outputs(self, inputs: Tree) -> Tree:
        """Compute parameter, moments and counts after the step, without a graph."""
        with torch.no_grad():
            return self._step(inputs, self.moments(inputs), differentiable=False)

    def traced(self, inputs: Tree) -> Tree:
        """Compute parameter, moments and counts after the step, with a graph over the inputs."""
        moments = self.moments(inputs) or self.start(inputs)
        # ASGD overwrites its own counts after using them, so what the graph keeps of them must be
        # copies. And a graph whose kept tensors hold the graph would never be freed.
        with saved_tensors_hooks(lambda t: t.clone() if t.dim() == 0 else t.detach(), lambda t: t):
            return self._step(inputs, moments, differentiable=True)

    def start(self, inputs: Tree) -> Tree:
        """Build the moments that the optimizer starts its first step from.

        torch would make them itself, but with counts in the default dtype.
        """
        if self.rule.differentiable_start is not None:
            return self.rule.differentiable_start(
                self.settings, inputs[PARAMETER], inputs[GRADIENT]
            )
        after = self.outputs(inputs)
        del after[PARAMETER]
        return self.rule.start(after, self.settings)

    def _step(self, inputs: Tree, moments: Tree, *, differentiable: bool) -> Tree:
        params, after = self.update.run(
            {PARAMETER: inputs[PARAMETER]},
            {PARAMETER: moments},
            {PARAMETER: inputs[GRADIENT]},
            differentiable=differentiable,
        )
        return after[PARAMETER] | params


def jacobian(
    update: Update,
    state: State,
    grads: Tree,
    *,
    chunk: FlatChunk,
    held: frozenset[str] = frozenset(),
) -> Diagonals:
    """Differentiate every output of the update by every input, at a chunk's entries.

    Outputs are `PARAMETER` and the optimizer's elementwise moments; inputs are the same and
    `GRADIENT`.

    Args:
        update: Of the step.
        state: Before the step.
        grads: The gradient that the optimizer consumes.
        chunk: The entries.
        held: Moments that are treated as constants, with the values that the update gives them.
    """
    flat = FlatUpdate.of(update, state, grads, chunk=chunk)
    at_rest = flat.rule.divides_by_lr and flat.settings["lr"] == 0
    if at_rest:
        # The differentiable mode divides by the rate. The derivatives of the moments do not depend
        # on it, and those of the parameter are known: it does not move.
        settings = flat.settings | {"lr": 1.0}
        flat = replace(flat, update=replace(flat.update, settings=(settings,)))
    dead = _dead_entries(flat)
    with torch.enable_grad():
        leaves: Tree = {}
        for key, tensor in flat.inputs.items():
            if key not in held:
                leaves[key] = tensor.requires_grad_()
        inputs = _with_safe_entries(flat, dead)
        with _HeldConstant() if held else nullcontext():
            outputs = flat.traced(inputs)
        outputs = _with_dead_entries(flat.rule, outputs, dead)
        diagonals = _diagonals(outputs, leaves)
    return _with_fixed_parameter(diagonals) if at_rest else diagonals


class _HeldConstant(TorchFunctionMode):
    """Updates tensors without a graph in place and without a graph, whatever they are updated with.

    So a held moment takes the value that the update gives it, and stays a constant.
    """

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor)
        constant = in_place and not args[0].requires_grad
        with torch.no_grad() if constant else nullcontext():
            return function(*args, **(kwargs or {}))


def _dead_entries(flat: FlatUpdate) -> Tensor | None:
    """Mark entries whose second moment is zero and stays zero; None if there are none.

    Adam divides by sqrt(v); at v = 0 autograd returns NaN. `_with_safe_entries` puts other values
    in before the step, `_with_dead_entries` restores v = 0 after it.
    """
    moments = flat.moments(flat.inputs)
    if not moments:
        # The first step makes the moments. Those after it are zero where they stay zero.
        moments = flat.outputs(flat.inputs)
    seconds = [moments[key] for key in moments if key in flat.rule.second_moments]
    if all(bool(second.amin() > 0) for second in seconds):
        return None
    # A square below the smallest normal number counts as zero: it may vanish when it is added to
    # the moment.
    square = flat.inputs[GRADIENT].square()
    without_gradient = square < torch.finfo(square.dtype).tiny
    dead = torch.stack([(second == 0) & without_gradient for second in seconds]).any(0)
    return dead if bool(dead.any()) else None


def _with_safe_entries(flat: FlatUpdate, dead: Tensor | None) -> Tree:
    r"""Replace v and g at dead entries, so that nothing is divided by zero.

    Nearly always such an entry has never received a gradient (dead unit, unused embedding row).
    Its derivative does not matter, because the derivative of its gradient is zero, and the gradient
    is made a constant. But where gradients of several samples cancel each other exactly, as those
    of an absolute error may, or a factor is zero, the derivative is the limit for small gradients,
    :math:`1/\epsilon` for Adam.
    """
    if dead is None:
        return flat.inputs
    safe = dict(flat.inputs)
    if not flat.moments(safe) and flat.cancelled is not None:
        safe |= flat.start(safe)
    value = torch.ones_like(safe[GRADIENT])
    constant = dead
    # Without eps there is no limit.
    if flat.cancelled is not None and flat.settings.get("eps", 0.0):
        # So small that its root is nothing beside eps.
        small = torch.finfo(value.dtype).tiny * 1e3
        value = torch.where(flat.cancelled, small, value)
        constant = dead & ~flat.cancelled
    for key in flat.rule.second_moments & safe.keys():
        safe[key] = torch.where(dead, value, safe[key])
    safe[GRADIENT] = torch.where(constant, 0.0, safe[GRADIENT])
    return safe


def _with_dead_entries(rule: OptimizerRule, outputs: Tree, dead: Tensor | None) -> Tree:
    """Restore v = 0 at dead entries after the step."""
    if dead is None:
        return outputs
    restored = dict(outputs)
    for key in rule.second_moments & outputs.keys():
        restored[key] = torch.where(dead, 0.0, outputs[key])
    return restored


def _diagonals(outputs: Tree, leaves: Tree) -> Diagonals:
    """Take derivatives by one backward pass per output.

    The gradient of the sum of an elementwise function is the diagonal of its Jacobian.
    """
    diagonals: Diagonals = {}
    for output, traced in sorted(outputs.items()):
        if not traced.requires_grad:
            continue
        by_leaf = torch.autograd.grad(
            traced.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for key, diagonal in zip(leaves, by_leaf, strict=True):
            if diagonal is not None:
                diagonals[output, key] = diagonal
    return diagonals


def _with_fixed_parameter(diagonals: Diagonals) -> Diagonals:
    """Make the derivatives of the parameter after the step those of the parameter before it."""
    fixed = dict(diagonals)
    for output, source in diagonals:
        if output == PARAMETER:
            value = 1.0 if source == PARAMETER else 0.0
            fixed[output, source] = torch.full_like(diagonals[output, source], value)
    return fixed
