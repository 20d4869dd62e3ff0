r"""Numerical verification of per-sample gradients: their weighted sum must be a gradient.

With random weights :math:`\omega` of the samples, the rows g of every parameter must add up to the
gradient of the weighted loss, :math:`\sum_b \omega_b g_b = \nabla \sum_b \omega_b \ell_b`. A layout
that was guessed wrong, a use that was not seen, or losses that depend on other samples all violate
that.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backtrail.errors import CoupledLoss, join_items
from backtrail.persample.rules import Parts, Reductions
from backtrail.step.step import MicroBatch
from backtrail.tree import Tree, norm, tree_leaves

log = logging.getLogger(__name__)

# Relative differences up to which two numbers of a precision count as equal.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
}
# Of a model, by the ways in which a pass used its parameters: the step and micro-batch of the last
# check, and the parameters that did not pass it.
_Place = tuple[int, int]
_RESULTS: "WeakKeyDictionary[nn.Module, dict[Hashable, tuple[_Place, frozenset[str]]]]" = (
    WeakKeyDictionary()
)


def unverified(
    micro_batch: MicroBatch,
    outputs: Any,
    losses: Float[Tensor, " slot"],
    leaves: Tree,
    *,
    kind: Hashable,
    reductions: Reductions,
    parts: Callable[[], Parts],
) -> frozenset[str]:
    """Parameters whose rows do not add up to their gradient, among those that have reductions.

    Checked for every new kind of pass, and again at steps 0, 1, 2, 4, 8, ...: gradients that happen
    to be zero prove nothing.

    Args:
        micro_batch: The micro-batch.
        outputs: Of the model, with their graph.
        losses: Of the samples, with their graph.
        leaves: The parameters that the graph starts from.
        kind: The ways in which the pass used its parameters.
        reductions: Of the rows.
        parts: Computes the rows.

    Raises:
        CoupledLoss: The loss of one sample depends on the outputs of another.
    """
    results = _RESULTS.setdefault(micro_batch.transition.task.binding, {})
    step = micro_batch.transition.step.index
    place = step, micro_batch.index
    if kind in results:
        last_place, names = results[kind]
        is_power_of_two = step & (step - 1) == 0
        if not is_power_of_two or last_place == place:
            return names
    contributes = micro_batch.share.to(losses) != 0
    omega = random_weights(len(losses), step).to(losses) * contributes
    tolerance = _tolerance(outputs, losses)
    _refuse_coupled(outputs, losses, omega, tolerance=tolerance)
    sketched = {name: leaf for name, leaf in leaves.items() if name in reductions}
    gradient = gradients_of((omega * losses).sum(), sketched)
    names = WeightedSum(omega, gradient, tolerance).disagreeing(parts(), reductions)
    results[kind] = place, names
    if names:
        log.info("differentiated sample by sample: %s", join_items(sorted(names), most=6))
    return names


def random_weights(slots: int, seed: int) -> Float[Tensor, " slot"]:
    """Random weights of samples, between 1 and 2: always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.rand(slots, generator=generator)


@final
@dataclass(frozen=True, slots=True)
class WeightedSum:
    """What the sketched gradients of samples must add up to.

    Attributes:
        omega: Random weights of the samples.
        gradient: Of their weighted loss.
        tolerance: Relative difference that is allowed.
    """

    omega: Float[Tensor, " slot"]
    gradient: Tree
    tolerance: float

    def disagreeing(self, parts: Parts, reductions: Reductions) -> frozenset[str]:
        """Parameters whose sketched gradients add up to something else."""
        # A gradient that cancels (e.g. of a bias before softmax) consists of the rounding errors of
        # others, so a share of the whole gradient's norm is allowed everywhere.
        rounding = 100 * torch.finfo(self.omega.dtype).eps * norm(self.gradient)
        names = set()
        for name, gradient in self.gradient.items():
            expected = reductions[name].reduce(gradient[None])[0]
            rows = expected.new_zeros(len(self.omega), len(expected))
            if name in parts:
                rows = parts[name] * self.omega[:, None]
            size = rows.norm(dim=1).sum() + expected.norm()
            difference = (rows.sum(0) - expected).norm()
            # Written so that NaN disagrees.
            if not difference <= self.tolerance * size + rounding:
                names.add(name)
        return frozenset(names)


def _tolerance(outputs: Any, losses: Tensor) -> float:
    """Tolerance of the coarsest precision among outputs (under autocast) and losses."""
    tolerance = TOLERANCE.get(losses.dtype, TOLERANCE[torch.bfloat16])
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor) and output.is_floating_point():
            tolerance = max(tolerance, TOLERANCE.get(output.dtype, TOLERANCE[torch.bfloat16]))
    return tolerance


def _refuse_coupled(outputs: Any, losses: Tensor, omega: Tensor, *, tolerance: float) -> None:
    """Check that every sample's loss depends on its own outputs alone.

    Raises:
        CoupledLoss: It does not.
    """
    leaves = tree_leaves(outputs)
    ends = [end for end in leaves if isinstance(end, Tensor) and end.requires_grad]
    cotangents = maybe_gradients(losses.sum(), ends)
    weighted_cotangents = maybe_gradients((omega * losses).sum(), ends)
    for plain, weighted in zip(cotangents, weighted_cotangents, strict=True):
        if plain is None or weighted is None:
            continue
        # Whichever axis has the slots: weighting the losses must weight the cotangent along it.
        axes = [axis for axis, size in enumerate(plain.shape) if size == len(omega)]
        separable = [_is_weighted(plain, weighted, omega, axis, tolerance) for axis in axes]
        if separable and not any(separable):
            raise CoupledLoss


def _is_weighted(
    plain: Tensor, weighted: Tensor, omega: Tensor, axis: int, tolerance: float
) -> bool:
    """Whether `weighted` is `plain` with weights along an axis."""
    expected = (plain.movedim(axis, -1) * omega).movedim(-1, axis)
    return bool((weighted - expected).norm() <= tolerance * expected.norm())


def maybe_gradients(loss: Tensor, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Gradients by tensors or edges of a graph, which is kept; None where it has no such input."""
    if not loss.requires_grad or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True))


def gradients_of(loss: Tensor, leaves: Tree) -> Tree:
    """Gradients of a number by every leaf."""
    gradients = {}
    found = maybe_gradients(loss, list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        gradients[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return gradients
