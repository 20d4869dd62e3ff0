r"""How a parameter's gradient follows, sample by sample, from the cotangents b of what it helped to compute.

Every kind of use knows the parameter's other factor (a layer's inputs, a table's places) and gives
the small form of all samples' gradients without the gradients. Tensors are arranged as `[slot,
token, feature]` first.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.functional import pad, unfold

from backtrail.persample.sketch import KroneckerSketch, Side, reduced
from backtrail.task.task import Batch

Loss = Callable[[Any, Batch], Tensor]  # outputs, batch -> [slot]
Reductions = Mapping[str, KroneckerSketch]
Asked = tuple[Loss | None, Reductions]  # of which loss (None: the task's), and made small how
Cotangents = Mapping[GradientEdge, Tensor | None]
Parts = dict[str, Tensor]  # [slot, rank] by parameter
Rows = tuple[Float[Tensor, "slot rank"], ...]  # by what was asked
TOKENS_FIRST = frozenset({"second", "flat, tokens first"})
Arranged = Callable[[Tensor], Tensor]  # what an operation gives or takes -> [slot, token, feature]


@dataclass(frozen=True)
class PerSampleRule(abc.ABC):
    """One use of a parameter in a forward pass.

    Attributes:
        name: of the parameter.
        edge: the place in the graph whose cotangent decides its gradient.
        arranged: brings that cotangent into order.
        layout: where the slots are in it.
    """

    name: str
    edge: GradientEdge
    arranged: Arranged
    layout: str

    @abc.abstractmethod
    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sides: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Small gradients `[slot, rank]` by set of reductions.

        Args:
            condensed: what `condensed` left of the cotangent b.
            factors: as `factors` reduced the other factor.
            sides: sets of reductions.
        """

    def condensed(self, cotangent: Tensor) -> Tensor:
        """All that must be kept of a (raw) cotangent, whatever the reductions will be."""
        return self.arranged(cotangent)

    def factors(self, sides: Sequence[KroneckerSketch]) -> list[Tensor]:
        """The parameter's other factor, reduced by every set of reductions; the same for all cotangents."""
        return [torch.empty(0)] * len(sides)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What must be proven once: this way of computing this parameter's gradient."""
        return type(self).__name__, self.name, self.layout


@final
@dataclass(frozen=True)
class MatmulRule(PerSampleRule):
    r"""A matrix product: :math:`\sum b a^\top` over the tokens, for every group of features.

    Attributes:
        inputs: makes a, `[slot, token, group x feature]`, which a convolution's pass itself does
            not hold.
        groups: how many blocks of features have products of their own.
        turned: the parameter's first axis is that of the inputs.
    """

    inputs: Callable[[], Tensor]
    groups: int = 1
    turned: bool = False

    def factors(self, sides: Sequence[KroneckerSketch]) -> list[Tensor]:
        """Reduced inputs."""
        x = self._split(self.inputs()) if self.groups > 1 else self.inputs()
        return reduced([one.left if self.turned else _right(one) for one in sides], x)

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sides: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """The reduced factors' product."""
        b = condensed
        if self.groups > 1:
            mixed = [torch.einsum("stgo,stgr->srgo", self._split(b), a).flatten(2) for a in factors]
            return [
                one.left.reduce(each).mT.flatten(1) for one, each in zip(sides, mixed, strict=True)
            ]
        outputs = reduced([_right(one) if self.turned else one.left for one in sides], b)
        pairs = zip(factors, outputs, strict=True)
        return [(a.mT @ b if self.turned else b.mT @ a).flatten(1) for a, b in pairs]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.groups, -1)


@final
@dataclass(frozen=True)
class LookupRule(PerSampleRule):
    """Rows of a table: every token's cotangent goes to its own row.

    Attributes:
        places: the row of every token, `[slot, token]`.
        ignored: a row without gradient.
    """

    places: Tensor
    ignored: int | None = None

    def factors(self, sides: Sequence[KroneckerSketch]) -> list[Tensor]:
        """Reduced unit vectors."""
        units = [one.left.unit(self.places) for one in sides]
        if self.ignored is None:
            return units
        contributes = (self.places != self.ignored)[..., None]
        return [unit * contributes for unit in units]

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sides: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Reduced unit vectors times reduced cotangents."""
        vectors = reduced([_right(one) for one in sides], condensed)
        return [(units.mT @ b).flatten(1) for units, b in zip(factors, vectors, strict=True)]


@final
@dataclass(frozen=True)
class ScaleRule(PerSampleRule):
    """A factor for every feature: the sum over tokens of b times what it multiplied.

    Attributes:
        inputs: makes what it multiplied, `[slot, token, feature]`; None: it was added.
    """

    inputs: Callable[[], Tensor] | None = None

    def condensed(self, cotangent: Tensor) -> Tensor:
        """The samples' whole gradients: they are small."""
        b = self.arranged(cotangent)
        return (b if self.inputs is None else b * self.inputs()).sum(1)

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sides: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Reduced like whole gradients."""
        del factors
        return [one.reduce(condensed) for one in sides]


@final
@dataclass(frozen=True)
class BroadcastRule(PerSampleRule):
    """A tensor made of parameters alone (a table of places, say) that every sample was given alike.

    Attributes:
        leaf: the parameter itself.
        source: what was made of it.
    """

    leaf: Tensor
    source: Tensor

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sides: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Each sample's cotangent, taken back through the short way from the source to the parameter."""
        del factors
        whole = self._pulled(condensed)
        return [one.reduce(whole) for one in sides]

    def _pulled(self, cotangent: Tensor) -> Tensor:
        if self.source is self.leaf:
            return cotangent
        (found,) = torch.autograd.grad(
            self.source,
            self.leaf,
            cotangent.to(self.source.dtype),
            retain_graph=True,
            is_grads_batched=True,
        )
        return found


def _right(sides: KroneckerSketch) -> Side:
    assert sides.right is not None, "a vector is no matrix"
    return sides.right


def layout_of(x: Tensor, slots: int) -> str | None:
    """Where the slots of a tensor with features last seem to be: a guess, to be proven by numbers."""
    if x.dim() >= 2 and x.shape[0] == slots:
        return "first"
    if x.dim() >= 3 and x.shape[1] == slots:
        return "second"
    return "flat" if x.dim() >= 2 and x.shape[:-1].numel() % slots == 0 else None


def by_slot(x: Tensor, slots: int, layout: str) -> Tensor:
    """Features last -> `[slot, token, feature]`."""
    if layout == "flat, tokens first":
        x = x.reshape(-1, slots, x.shape[-1])
    return (x.transpose(0, 1) if layout in TOKENS_FIRST else x).reshape(slots, -1, x.shape[-1])


def channels_last(x: Tensor) -> Tensor:
    """`[row, channel, *places]` -> `[row, place, channel]`."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo the broadcasting of a tensor of this shape to x, but for the slots, x's first axis."""
    full = (1,) * (x.dim() - len(shape)) + tuple(shape)
    axes = [axis for axis in range(1, x.dim()) if full[axis] == 1 and x.shape[axis] != 1]
    return (x.sum(axes) if axes else x).reshape(len(x), *shape)


def patches(x: Tensor, size: Sequence[int], conv: dict[str, tuple[int, ...] | str]) -> Tensor:
    """What a convolution's kernel sees at every place, `[row, place, channel x kernel]`, for one or two axes."""
    strides, dilations = (_each(conv[key], len(size)) for key in ("stride", "dilation"))
    if conv["padding"] == "same":
        wide = [d * (k - 1) for k, d in zip(size, dilations, strict=True)]
        x = pad(x, [side for total in reversed(wide) for side in (total // 2, total - total // 2)])
        paddings: tuple[int, ...] = (0,) * len(size)
    else:
        paddings = (
            (0,) * len(size) if conv["padding"] == "valid" else _each(conv["padding"], len(size))
        )
    if len(size) == 1:
        x, size, strides, dilations = x[:, :, None], (1, *size), (1, *strides), (1, *dilations)
        paddings = (0, *paddings)
    return unfold(x, tuple(size), dilations, paddings, strides).mT


def _each(value: int | tuple[int, ...] | str, axes: int) -> tuple[int, ...]:
    assert not isinstance(value, str)
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


@final
class Gathered:
    """Sums up small gradients over the uses of their parameters.

    Args:
        losses: of which one or another small form will be added (None: the task's, weighted with
            shares of a step's).
    """

    def __init__(self, losses: Sequence[Loss | None]) -> None:
        self._losses = losses
        self._parts: list[Parts] = [{} for _ in losses]

    def add(
        self,
        use: PerSampleRule,
        condensed: Mapping[Loss | None, Tensor],
        sides: Sequence[KroneckerSketch],
    ) -> None:
        """Add what follows from a use.

        Args:
            use: of a parameter.
            condensed: what the use keeps of its cotangent under each loss; losses that are not
                there add nothing.
            sides: of the parameter, by place in `losses`.
        """
        places = [place for place, loss in enumerate(self._losses) if loss in condensed]
        factors = _factors(use, [sides[place] for place in places])
        for loss, kept in condensed.items():
            ours = [place for place in places if self._losses[place] is loss]
            found = use.rows(
                kept,
                [factors[id(sides[place])] for place in ours],
                [sides[place] for place in ours],
            )
            for place, rows in zip(ours, found, strict=True):
                part = self._parts[place]
                part[use.name] = part[use.name] + rows if use.name in part else rows

    def parts(self, share: Float[Tensor, " slot"]) -> list[Parts]:
        """By place in `losses`, of single losses: without the shares that the task's was weighted with."""
        inverse = torch.where(share != 0, 1 / share, 0)[:, None]
        return [
            {name: part * inverse for name, part in parts.items()} if loss is None else parts
            for loss, parts in zip(self._losses, self._parts, strict=True)
        ]


def _factors(use: PerSampleRule, sides: Sequence[KroneckerSketch]) -> dict[int, Tensor]:
    """The use's other factor by reduction, each made once."""
    apart = list({id(one): one for one in sides}.values())
    return {id(one): factor for one, factor in zip(apart, use.factors(apart), strict=True)}


def parts_of(
    uses: Sequence[PerSampleRule],
    cotangents: Mapping[Loss | None, Cotangents],
    asked: Sequence[Asked],
    *,
    share: Float[Tensor, " slot"],
) -> list[Parts]:
    """Small gradients by what was asked, from the cotangents of all uses."""
    found = Gathered([loss for loss, _ in asked])
    for use in uses:
        given = {
            loss: b for loss, of_loss in cotangents.items() if (b := of_loss[use.edge]) is not None
        }
        if given and all(use.name in reductions for _, reductions in asked):
            kept = {loss: use.condensed(b) for loss, b in given.items()}
            found.add(use, kept, [reductions[use.name] for _, reductions in asked])
    return found.parts(share)


def row_of(
    parts: Parts, reductions: Reductions, *, like: Float[Tensor, " slot"]
) -> Float[Tensor, "slot rank"]:
    """All parameters behind each other; those that were not used have zeros."""
    zeros = (like.new_zeros(len(like), one.rank) for one in reductions.values())
    return torch.cat(
        [parts.get(name, zero) for name, zero in zip(reductions, zeros, strict=True)], 1
    )
