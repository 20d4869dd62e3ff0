r"""Which parameters' rows are explained by what was watched: those whose sum is the gradient.

With random weights :math:`\omega` of the samples, the rows of every parameter must add up to the
gradient of the weighted loss. A misread layout, an unseen use, or losses that depend on other
samples all break that.
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

AGREES = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
}  # relative difference that counts as none
# What was found about a model, by the ways in which it used its parameters; and at which step and
# micro-batch.
_FOUND: "WeakKeyDictionary[nn.Module, dict[Hashable, tuple[tuple[int, int], frozenset[str]]]]" = (
    WeakKeyDictionary()
)


def unverified(
    micro_batch: MicroBatch,
    ends: tuple[Any, Tensor],
    leaves: Tree,
    *,
    kind: Hashable,
    reductions: Reductions,
    parts: Callable[[], Parts],
) -> frozenset[str]:
    """Parameters whose rows do not add up to their gradients, among those that have reductions.

    Computed anew for every kind of pass, and at steps 0, 1, 2, 4, 8, ...: gradients that are zero
    prove nothing.

    Args:
        micro_batch: the micro-batch.
        ends: the model's outputs and the losses `[slot]`, with their graph.
        leaves: the parameters that the graph starts from.
        kind: the ways in which the pass used its parameters.
        reductions: of the rows.
        parts: makes the rows.

    Raises:
        CoupledLoss: the loss of one sample depends on the outputs of another.
    """
    found, number = (
        _FOUND.setdefault(micro_batch.transition.task.binding, {}),
        micro_batch.transition.step.index,
    )
    place = number, micro_batch.index
    if kind not in found or (number & (number - 1) == 0 and found[kind][0] != place):
        outputs, losses = ends
        omega = weights(len(losses), number).to(losses) * (micro_batch.share.to(losses) != 0)
        agrees = _agrees(outputs, losses)
        _refuse_coupled(outputs, losses, omega, agrees=agrees)
        small = {name: leaf for name, leaf in leaves.items() if name in reductions}
        truth = Weighted(omega, slopes_of((omega * losses).sum(), small), agrees)
        found[kind] = place, truth.unlike(parts(), reductions)
        if off := found[kind][1]:
            log.info("differentiated sample by sample: %s", join_items(sorted(off), most=6))
    return found[kind][1]


def weights(slots: int, seed: int) -> Float[Tensor, " slot"]:
    """Random weights of samples, between 1 and 2."""
    return 1 + torch.rand(slots, generator=torch.Generator().manual_seed(seed))


@final
@dataclass(frozen=True, slots=True)
class Weighted:
    """What the small gradients of samples must add up to.

    Attributes:
        omega: random weights of the samples.
        slopes: the gradient of their weighted loss.
        agrees: the relative difference that counts as none.
    """

    omega: Float[Tensor, " slot"]
    slopes: Tree
    agrees: float

    def unlike(self, parts: Parts, reductions: Reductions) -> frozenset[str]:
        """The parameters whose small gradients do not."""
        # A gradient that cancels (of a bias before softmax, say) is rounding of others.
        rounding = 100 * torch.finfo(self.omega.dtype).eps * norm(self.slopes)
        off = set()
        for name, slope in self.slopes.items():
            wanted = reductions[name].reduce(slope[None])[0]
            rows = (
                parts.get(name, wanted.new_zeros(len(self.omega), len(wanted)))
                * self.omega[:, None]
            )
            allowed = self.agrees * (rows.norm(dim=1).sum() + wanted.norm()) + rounding
            if not (rows.sum(0) - wanted).norm() <= allowed:
                off.add(name)
        return frozenset(off)


def _agrees(outputs: Any, losses: Tensor) -> float:
    """As close as the coarsest of them (under autocast, the outputs) allows."""
    ends = [
        losses,
        *(
            end
            for end in tree_leaves(outputs)
            if isinstance(end, Tensor) and end.is_floating_point()
        ),
    ]
    return max(AGREES.get(end.dtype, AGREES[torch.bfloat16]) for end in ends)


def _refuse_coupled(outputs: Any, losses: Tensor, omega: Tensor, *, agrees: float) -> None:
    """Every sample's loss must be read off its own outputs.

    Raises:
        CoupledLoss: it is not.
    """
    ends = [end for end in tree_leaves(outputs) if isinstance(end, Tensor) and end.requires_grad]
    pairs = [grads(loss.sum(), ends) for loss in (losses, omega * losses)]
    for plain, weighted in zip(*pairs, strict=True):
        if plain is None or weighted is None:
            continue
        axes = [axis for axis, size in enumerate(plain.shape) if size == len(omega)]
        if axes and not any(
            _separable(plain, weighted, omega=omega, axis=axis, agrees=agrees) for axis in axes
        ):
            raise CoupledLoss


def _separable(plain: Tensor, weighted: Tensor, *, omega: Tensor, axis: int, agrees: float) -> bool:
    """Whether weights of the losses are weights along an axis of their cotangents."""
    wanted = (plain.movedim(axis, -1) * omega).movedim(-1, axis)
    return bool((weighted - wanted).norm() <= agrees * wanted.norm())


def grads(loss: Tensor, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Of a number by tensors or edges of its graph, which is kept; None where it does not depend on them."""
    if not loss.requires_grad or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True))


def slopes_of(loss: Tensor, leaves: Tree) -> Tree:
    """Of a number by every leaf."""
    found = grads(loss, list(leaves.values()))
    return {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }
