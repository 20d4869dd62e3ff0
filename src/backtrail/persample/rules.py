r"""Per-sample gradient rules: from the cotangent of an operation to its parameter's gradients.

A forward pass uses a parameter in an operation (a matrix product, a lookup in a table, ...). Each
rule holds the other factor of that operation, such as a layer's inputs a, and computes the sketched
gradients of all samples from it and from the cotangent b of the operation's output, without forming
the gradients. Tensors are brought to `[slot, token, feature]` first.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.functional import pad, unfold

from backtrail.persample.sketch import KroneckerSketch, Side, reduce_all
from backtrail.task.task import Batch

Loss = Callable[[Any, Batch], Tensor]  # outputs, batch -> [slot]
Reductions = Mapping[str, KroneckerSketch]  # by parameter
# Which loss (None: the task's own), and how its gradients are sketched.
Request = tuple[Loss | None, Reductions]
Cotangents = Mapping[GradientEdge, Tensor | None]
Parts = dict[str, Tensor]  # sketched gradients [slot, rank], by parameter
Rows = tuple[Float[Tensor, "slot rank"], ...]  # by request
# From what an operation takes or returns to [slot, token, feature].
ToSlots = Callable[[Tensor], Tensor]
# Where the slots of a tensor with features last are: in the first axis, in the second, or in one
# long axis of [slot, token], or of [token, slot].
Layout = Literal["first", "second", "flat", "flat, tokens first"]


@dataclass(frozen=True)
class PerSampleRule(abc.ABC):
    """One use of a parameter in a forward pass.

    Attributes:
        name: Of the parameter.
        edge: Where in the graph the cotangent b arrives.
        to_slots: Brings that cotangent to `[slot, token, feature]`.
        layout: Where the slots are in it.
    """

    name: str
    edge: GradientEdge
    to_slots: ToSlots
    layout: Layout

    @abc.abstractmethod
    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sketches: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Sketched gradients `[slot, rank]`, one tensor per sketch.

        Args:
            condensed: What `condense` left of the cotangent b.
            factors: The other factor as `factors` sketched it.
            sketches: Of the parameter.
        """

    def condense(self, cotangent: Tensor) -> Tensor:
        """All that has to be kept of a raw cotangent, whatever the sketches will be."""
        return self.to_slots(cotangent)

    def factors(self, sketches: Sequence[KroneckerSketch]) -> list[Tensor]:
        """The parameter's other factor by sketch; the same for all cotangents."""
        return [torch.empty(0)] * len(sketches)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What has to be verified once: this way of computing this parameter's gradient."""
        return type(self).__name__, self.name, self.layout


@final
@dataclass(frozen=True)
class MatmulRule(PerSampleRule):
    r"""A matrix product, with the gradient :math:`\sum b a^\top` over the tokens, group by group.

    Attributes:
        inputs: Computes a, `[slot, token, group x feature]`. A convolution does not hold its
            patches, so they are computed when they are needed.
        groups: Number of blocks of features that have products of their own.
        transposed: The parameter's first axis is that of the inputs.
    """

    inputs: Callable[[], Tensor]
    groups: int = 1
    transposed: bool = False

    def factors(self, sketches: Sequence[KroneckerSketch]) -> list[Tensor]:
        """Sketched inputs."""
        a = self.inputs()
        if self.groups > 1:
            a = self._by_group(a)
        sides = []
        for sketch in sketches:
            sides.append(sketch.left if self.transposed else _right(sketch))
        return reduce_all(sides, a)

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sketches: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """The product of both sketched factors."""
        if self.groups > 1:
            return self._rows_by_group(condensed, factors, sketches)
        sides = []
        for sketch in sketches:
            sides.append(_right(sketch) if self.transposed else sketch.left)
        rows = []
        for a, b in zip(factors, reduce_all(sides, condensed), strict=True):
            product = a.mT @ b if self.transposed else b.mT @ a
            rows.append(product.flatten(1))
        return rows

    def _rows_by_group(
        self, condensed: Tensor, factors: Sequence[Tensor], sketches: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        # The parameter's first axis holds the outputs o of all groups g, one after the other, so
        # the left side can only be sketched once they are together.
        b = self._by_group(condensed)  # [slot, token, group, output]
        rows = []
        for sketch, a in zip(sketches, factors, strict=True):  # [slot, token, group, rank]
            products = torch.einsum("stgo,stgr->srgo", b, a).flatten(2)
            rows.append(sketch.left.reduce(products).mT.flatten(1))
        return rows

    def _by_group(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.groups, -1)


@final
@dataclass(frozen=True)
class LookupRule(PerSampleRule):
    """A lookup in a table: every token's cotangent is added to its own row of the gradient.

    Attributes:
        places: The row of every token, `[slot, token]`.
        ignored: A row without gradient.
    """

    places: Tensor
    ignored: int | None = None

    def factors(self, sketches: Sequence[KroneckerSketch]) -> list[Tensor]:
        """Sketched unit vectors."""
        units = [sketch.left.unit(self.places) for sketch in sketches]
        if self.ignored is None:
            return units
        contributes = (self.places != self.ignored)[..., None]
        return [unit * contributes for unit in units]

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sketches: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Sketched unit vectors times sketched cotangents."""
        cotangents = reduce_all([_right(sketch) for sketch in sketches], condensed)
        rows = []
        for units, b in zip(factors, cotangents, strict=True):
            rows.append((units.mT @ b).flatten(1))
        return rows


@final
@dataclass(frozen=True)
class ScaleRule(PerSampleRule):
    """A factor or a summand of every feature: the sum over tokens of b times what was multiplied.

    Attributes:
        inputs: Computes what was multiplied, `[slot, token, feature]`; None: it was added.
    """

    inputs: Callable[[], Tensor] | None = None

    def condense(self, cotangent: Tensor) -> Tensor:
        """The samples' whole gradients: they are small."""
        b = self.to_slots(cotangent)
        products = b if self.inputs is None else b * self.inputs()
        return products.sum(1)

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sketches: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Sketches of the whole gradients."""
        del factors
        return [sketch.reduce(condensed) for sketch in sketches]


@final
@dataclass(frozen=True)
class BroadcastRule(PerSampleRule):
    """A tensor made of parameters alone (e.g. position embeddings) that is given to every sample.

    Attributes:
        leaf: The parameter itself.
        source: What was made of it.
    """

    leaf: Tensor
    source: Tensor

    def rows(
        self, condensed: Tensor, factors: Sequence[Tensor], sketches: Sequence[KroneckerSketch]
    ) -> list[Tensor]:
        """Sketches of each sample's cotangent, taken back from the source to the parameter."""
        del factors
        gradients = self._gradients(condensed)
        return [sketch.reduce(gradients) for sketch in sketches]

    def _gradients(self, cotangents: Tensor) -> Tensor:
        if self.source is self.leaf:
            return cotangents
        (found,) = torch.autograd.grad(
            self.source,
            self.leaf,
            cotangents.to(self.source.dtype),
            retain_graph=True,
            is_grads_batched=True,
        )
        return found


def _right(sketch: KroneckerSketch) -> Side:
    assert sketch.right is not None, "a vector has one side only"
    return sketch.right


def layout_of(x: Tensor, slots: int) -> Layout | None:
    """Where the slots of a tensor with features last seem to be: a guess, to be verified."""
    if x.dim() >= 2 and x.shape[0] == slots:
        return "first"
    if x.dim() >= 3 and x.shape[1] == slots:
        return "second"
    if x.dim() >= 2 and x.shape[:-1].numel() % slots == 0:
        return "flat"
    return None


def by_slot(x: Tensor, slots: int, layout: Layout) -> Tensor:
    """Bring a tensor with features last to `[slot, token, feature]`."""
    if layout == "flat, tokens first":
        x = x.reshape(-1, slots, x.shape[-1])
    if layout in {"second", "flat, tokens first"}:
        x = x.transpose(0, 1)
    return x.reshape(slots, -1, x.shape[-1])


def channels_last(x: Tensor) -> Tensor:
    """`[row, channel, *places]` -> `[row, place, channel]`."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def sum_to_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """Transpose the broadcasting of a tensor of this shape, except to slots, the first axis."""
    full = (1,) * (x.dim() - len(shape)) + tuple(shape)
    axes = [axis for axis in range(1, x.dim()) if full[axis] == 1 and x.shape[axis] != 1]
    summed = x.sum(axes) if axes else x
    return summed.reshape(len(x), *shape)


def patches(x: Tensor, size: Sequence[int], conv: dict[str, tuple[int, ...] | str]) -> Tensor:
    """What a convolution's kernel covers at every place, `[row, place, channel x kernel]`.

    Args:
        x: Inputs of a convolution over one or two axes.
        size: Of the kernel.
        conv: `stride`, `padding` and `dilation` as torch takes them.
    """
    axes = len(size)
    stride = _by_axis(conv["stride"], axes)
    dilation = _by_axis(conv["dilation"], axes)
    padding: tuple[int, ...] = (0,) * axes
    if conv["padding"] == "same":
        x = _pad_to_same(x, size, dilation)
    elif conv["padding"] != "valid":
        padding = _by_axis(conv["padding"], axes)
    if axes == 1:
        # `unfold` knows images only: an image of height 1.
        x = x[:, :, None]
        size = (1, *size)
        stride = (1, *stride)
        dilation = (1, *dilation)
        padding = (0, *padding)
    return unfold(x, tuple(size), dilation, padding, stride).mT


def _pad_to_same(x: Tensor, size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    sides: list[int] = []
    for kernel, step in zip(reversed(size), reversed(dilation), strict=True):  # last axis first
        total = step * (kernel - 1)
        before = total // 2
        sides += [before, total - before]
    return pad(x, sides)


def _by_axis(value: int | tuple[int, ...] | str, axes: int) -> tuple[int, ...]:
    assert not isinstance(value, str)
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


@final
class RowSums:
    """Sums of sketched gradients over the uses of their parameters.

    Args:
        losses: Of which loss each requested sketch is (None: the task's, weighted with the slots'
            shares of a step's loss).
    """

    def __init__(self, losses: Sequence[Loss | None]) -> None:
        self._losses = losses
        self._parts: list[Parts] = [{} for _ in losses]

    def add(
        self,
        use: PerSampleRule,
        condensed: Mapping[Loss | None, Tensor],
        sketches: Sequence[KroneckerSketch],
    ) -> None:
        """Add what follows from one use.

        Args:
            use: Of a parameter.
            condensed: What the use keeps of its cotangent under each loss; a loss that is missing
                adds nothing.
            sketches: Of the parameter, by place in `losses`.
        """
        places = [place for place, loss in enumerate(self._losses) if loss in condensed]
        factors = _factors(use, [sketches[place] for place in places])
        for loss, kept in condensed.items():
            of_loss = [place for place in places if self._losses[place] is loss]
            own_sketches = [sketches[place] for place in of_loss]
            own_factors = [factors[id(sketch)] for sketch in own_sketches]
            found = use.rows(kept, own_factors, own_sketches)
            for place, rows in zip(of_loss, found, strict=True):
                part = self._parts[place]
                part[use.name] = part[use.name] + rows if use.name in part else rows

    def parts(self, share: Float[Tensor, " slot"]) -> list[Parts]:
        """The sums by place in `losses`, of single losses: without the shares of the task's own."""
        inverse = torch.where(share != 0, 1 / share, 0)[:, None]
        found = []
        for loss, sums in zip(self._losses, self._parts, strict=True):
            if loss is None:
                found.append({name: rows * inverse for name, rows in sums.items()})
            else:
                found.append(sums)
        return found


def _factors(use: PerSampleRule, sketches: Sequence[KroneckerSketch]) -> dict[int, Tensor]:
    """The use's other factor by sketch (its id), each computed once."""
    distinct = list({id(sketch): sketch for sketch in sketches}.values())
    factors = use.factors(distinct)
    return {id(sketch): factor for sketch, factor in zip(distinct, factors, strict=True)}


def sum_over_uses(
    uses: Sequence[PerSampleRule],
    cotangents: Mapping[Loss | None, Cotangents],
    requests: Sequence[Request],
    *,
    share: Float[Tensor, " slot"],
) -> list[Parts]:
    """Sketched gradients by request, from the cotangents of all uses under each loss."""
    sums = RowSums([loss for loss, _ in requests])
    for use in uses:
        if not all(use.name in reductions for _, reductions in requests):
            continue
        condensed = {}
        for loss, of_loss in cotangents.items():
            b = of_loss[use.edge]
            if b is not None:
                condensed[loss] = use.condense(b)
        if condensed:
            sums.add(use, condensed, [reductions[use.name] for _, reductions in requests])
    return sums.parts(share)


def concatenate_rows(
    parts: Parts, reductions: Reductions, *, like: Float[Tensor, " slot"]
) -> Float[Tensor, "slot rank"]:
    """All parameters one after the other; those that were not used have zeros."""
    columns = []
    for name, sketch in reductions.items():
        if name in parts:
            columns.append(parts[name])
        else:
            columns.append(like.new_zeros(len(like), sketch.rank))
    return torch.cat(columns, 1)
