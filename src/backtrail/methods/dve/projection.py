r"""Random projections of gradients, small enough to be stored for every visit of a training.

Decisions: a projection belongs to a parameter, not to a module, so tied weights have one. Its two
sides are drawn apart, from the seed, the parameter's name and the side's number: two sides drawn
alike would make the sketch biased. The small gradients of all parameters lie behind each other
along one axis, `layer-rank`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from math import isqrt
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backtrail.errors import BadSetting
from backtrail.persample.sketch import Dense, KroneckerSketch, Picked, Side
from backtrail.run.manifest import Manifest
from backtrail.task.task import Task
from backtrail.tree import Tree

Kind = Literal["gaussian", "orthonormal", "mask"]
Factors = Mapping[str, tuple[Tensor, ...]]  # of a parameter's one or two sides


@final
@dataclass(frozen=True)
class Projection:
    r"""The reductions of all parameters, in the order of their names along the small axis.

    The inner product of two projected gradients estimates that of the gradients:

    .. math:: \langle A^\top G B, A^\top G' B \rangle \approx \langle G, G' \rangle

    Args:
        sides: reductions by parameter name.

    >>> whole = projection({"w": (3, 2)}, kind="orthonormal", rank=6)
    >>> whole.of_gradient({"w": torch.ones(5, 3, 2)}).square().sum(1).tolist()
    [6.0, 6.0, 6.0, 6.0, 6.0]
    """

    sides: dict[str, KroneckerSketch]

    @cached_property
    def layout(self) -> dict[str, slice]:
        """Where every parameter's entries lie along the small axis."""
        stops = list(accumulate((sides.rank for sides in self.sides.values()), initial=0))
        return dict(zip(self.sides, map(slice, stops[:-1], stops[1:]), strict=True))

    @property
    def rank(self) -> int:
        """Length of the small axis."""
        return sum(sides.rank for sides in self.sides.values())

    def of_gradient(self, gradients: Tree) -> Float[Tensor, "row rank"]:
        """Project whole gradients, `[row, *shape]` by name; a parameter that is missing counts as zero."""
        like = next(iter(gradients.values()))
        parts = [
            sides.reduce(gradients[name])
            if name in gradients
            else like.new_zeros(len(like), sides.rank)
            for name, sides in self.sides.items()
        ]
        return torch.cat(parts, 1)

    def scaled(self, factors: Factors) -> "Projection":
        """The projection of gradients whose entries are first multiplied by the factors of their row and column."""
        return Projection(
            {name: sides.scaled(*factors[name]) for name, sides in self.sides.items()}
        )

    def entries(self, name: str) -> Int[Tensor, " rank"]:
        """Which entries of a flattened parameter a mask picked, in the order of the small axis.

        Raises:
            BadSetting: the projection mixes entries.
        """
        sides = self.sides[name]
        picked = [_picked(side) for side in (sides.left, sides.right) if side is not None]
        if len(picked) == 1 or sides.right is None:
            return picked[0]
        return (picked[0][:, None] * sides.right.size + picked[1]).flatten()

    def of_diagonal(self, diagonal: Tree) -> Float[Tensor, " rank"]:
        """The entries that a mask picked of one tensor like the parameters, unweighted."""
        return torch.cat([diagonal[name].flatten()[self.entries(name)] for name in self.sides])


def projection(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kind: Kind = "gaussian",
    rank: int = 256,
    seed: int = 0,
    like: Tensor | None = None,
) -> Projection:
    """Draw the projections of parameters of the given shapes.

    Args:
        shapes: by parameter name.
        kind: "gaussian" is unbiased and mixes all entries. "orthonormal" is exact where the rank is
            that of the sides. "mask" picks entries, on which elementwise operations (Adam's) stay
            exact.
        rank: most entries that one parameter may have. A matrix divides it among its two sides, as
            equally as can be.
        seed: the same seed gives the same projection, on every device.
        like: its precision and device are taken.

    Raises:
        BadSetting: a rank below 1.
    """
    if rank < 1:
        raise BadSetting("rank", rank, "a whole number, 1 or more")
    like = torch.empty(()) if like is None else like
    found = {}
    for name, shape in shapes.items():
        sizes = KroneckerSketch.sizes(tuple(shape))
        ranks = ranks_of(sizes, rank)
        sides = [
            # Nothing is drawn where nothing is saved.
            _all(size)
            if ranks[place] == size
            else _DRAWN[kind](size, ranks[place], _generator(seed, name, place))
            for place, size in enumerate(sizes)
        ]
        found[name] = KroneckerSketch(*(_moved(side, like) for side in sides))
    return Projection(found)


def projection_for(
    task: Task, manifest: Manifest, *, kind: Kind, rank: int, seed: int
) -> Projection:
    """The projection of a training's parameters; those of one module stand behind each other."""
    params = manifest.params
    shapes = {
        name: params[name].shape
        for name in by_module(name for group in manifest.groups for name in group)
    }
    precisions = (getattr(torch, one.dtype) for one in params.values())
    precise = next(precision for precision in precisions if precision.is_floating_point)
    like = torch.empty((), dtype=precise, device=task.device)
    return projection(shapes, kind=kind, rank=rank, seed=seed, like=like)


def by_module(names: Iterable[str]) -> list[str]:
    """Names of parameters with those of one module behind each other.

    >>> by_module(["a.weight", "b.weight", "a.bias"])
    ['a.weight', 'a.bias', 'b.weight']
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return list(chain.from_iterable(found.values()))


def blocks_of(whole: Projection, *, dense: bool) -> dict[str, tuple[int, int]]:
    """The coordinates that the recursion treats together: a module's, or all."""
    if dense:
        return {"all layers": (0, whole.rank)}
    found: dict[str, tuple[int, int]] = {}
    for name, place in whole.layout.items():
        module = name.rpartition(".")[0] or "model"
        found[module] = (found.get(module, (place.start, 0))[0], place.stop)
    return found


def ranks_of(sizes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The ranks of a parameter's sides: balanced, none above its size, their product at most `rank`.

    >>> (
    ...     ranks_of((512, 128), 256),
    ...     ranks_of((512, 4), 256),
    ...     ranks_of((1000,), 256),
    ...     ranks_of((3, 2), 256),
    ... )
    ((16, 16), (64, 4), (256,), (3, 2))
    """
    if len(sizes) == 1:
        return (min(sizes[0], rank),)
    left = min(sizes[0], isqrt(rank))
    right = min(sizes[1], rank // left)
    return min(sizes[0], rank // right), right


def _generator(seed: int, name: str, place: int) -> torch.Generator:
    """Another stream of numbers for every side."""
    return torch.Generator().manual_seed(seed_of(seed, place, name))


def seed_of(*what: object) -> int:
    """A seed for this and nothing else, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _gaussian(size: int, rank: int, draw: torch.Generator) -> Side:
    return Dense(torch.randn(size, rank, generator=draw, dtype=torch.float64) / rank**0.5)


def _orthonormal(size: int, rank: int, draw: torch.Generator) -> Side:
    """Scaled so that it is unbiased: a random subspace holds rank / size of a vector's square."""
    basis = torch.linalg.qr(torch.randn(size, rank, generator=draw, dtype=torch.float64))[0]
    return Dense(basis * (size / rank) ** 0.5)


def _mask(size: int, rank: int, draw: torch.Generator) -> Side:
    index = torch.randperm(size, generator=draw)[:rank].sort()[0]
    return Picked(size, index, torch.full((rank,), (size / rank) ** 0.5, dtype=torch.float64))


def _all(size: int) -> Side:
    return Picked(size, torch.arange(size), torch.ones(size, dtype=torch.float64))


_DRAWN: dict[Kind, Callable[[int, int, torch.Generator], Side]] = {
    "gaussian": _gaussian,
    "orthonormal": _orthonormal,
    "mask": _mask,
}


def _moved(side: Side, like: Tensor) -> Side:
    if isinstance(side, Picked):
        return Picked(side.size, side.index.to(like.device), side.weight.to(like))
    assert isinstance(side, Dense)
    return Dense(side.basis.to(like))


def _picked(side: Side) -> Tensor:
    if not isinstance(side, Picked):
        raise BadSetting(
            "kind", "gaussian or orthonormal", "'mask', where single entries are asked for"
        )
    return side.index
