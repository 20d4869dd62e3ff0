r"""Random projections of gradients, small enough to be stored for every visit of a training.

Decisions: a projection belongs to a parameter, not to a module, so tied weights have one. The two
sides of a matrix are drawn independently, from the seed, the parameter's name and the side's
number: equal seeds for both sides would bias the sketch. The projected gradients of all parameters
follow one another along one axis.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
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
# By parameter: a factor for every row of a matrix and one for every column, or one for every entry
# of a vector.
Factors = Mapping[str, tuple[Tensor, ...]]


@final
@dataclass(frozen=True)
class Projection:
    r"""The sketches of all parameters, in the order of their names along the projected axis.

    The inner product of two projected gradients estimates that of the gradients:

    .. math:: \langle A^\top G B, A^\top G' B \rangle \approx \langle G, G' \rangle

    Args:
        sides: Sketch of each parameter, by name.

    >>> whole = projection({"w": (3, 2)}, kind="orthonormal", rank=6)
    >>> whole.of_gradient({"w": torch.ones(5, 3, 2)}).square().sum(1).tolist()
    [6.0, 6.0, 6.0, 6.0, 6.0]
    """

    sides: dict[str, KroneckerSketch]

    @cached_property
    def layout(self) -> dict[str, slice]:
        """Coordinates of every parameter along the projected axis."""
        layout = {}
        start = 0
        for name, sketch in self.sides.items():
            layout[name] = slice(start, start + sketch.rank)
            start += sketch.rank
        return layout

    @property
    def rank(self) -> int:
        """Length of the projected axis."""
        return sum(sketch.rank for sketch in self.sides.values())

    def of_gradient(self, gradients: Tree) -> Float[Tensor, "row rank"]:
        """Project gradients `[row, *shape]`; a parameter that is missing counts as zero."""
        like = next(iter(gradients.values()))
        parts = []
        for name, sketch in self.sides.items():
            if name in gradients:
                parts.append(sketch.reduce(gradients[name]))
            else:
                parts.append(like.new_zeros(len(like), sketch.rank))
        return torch.cat(parts, dim=1)

    def scaled(self, factors: Factors) -> "Projection":
        """The projection of gradients after multiplying entries by factors of row and column."""
        return Projection(
            {name: sketch.scaled(*factors[name]) for name, sketch in self.sides.items()}
        )

    def entries(self, name: str) -> Int[Tensor, " rank"]:
        """Places in the flattened parameter that a mask picked, in the order of the coordinates.

        Raises:
            BadSetting: The projection mixes entries.
        """
        sketch = self.sides[name]
        rows = _picked(sketch.left)
        if sketch.right is None:
            return rows
        columns = _picked(sketch.right)
        return (rows[:, None] * sketch.right.size + columns).flatten()

    def of_diagonal(self, diagonal: Tree) -> Float[Tensor, " rank"]:
        """The entries that a mask picked of one tensor per parameter, unweighted."""
        picked = [diagonal[name].flatten()[self.entries(name)] for name in self.sides]
        return torch.cat(picked)


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
        shapes: By parameter name.
        kind: "gaussian" is unbiased and mixes all entries. "orthonormal" is exact where the rank
            equals the sizes of the sides. "mask" picks entries, so that elementwise operations
            (Adam's) stay exact.
        rank: Most coordinates that one parameter may have. A matrix divides it between its two
            sides, as equally as possible.
        seed: The same seed gives the same projection, on every device.
        like: Precision and device of the result.

    Raises:
        BadSetting: The rank is below 1.
    """
    if rank < 1:
        raise BadSetting("rank", rank, "a positive integer")
    like = torch.empty(()) if like is None else like
    sketches = {}
    for name, shape in shapes.items():
        sizes = KroneckerSketch.sizes(tuple(shape))
        sides = []
        for place, (size, side_rank) in enumerate(zip(sizes, ranks_of(sizes, rank), strict=True)):
            if side_rank == size:
                # A random rotation would save nothing.
                side = _all_entries(size)
            else:
                # Each side of each parameter has its own stream of random numbers.
                generator = torch.Generator().manual_seed(seed_of(seed, place, name))
                side = _RANDOM_SIDES[kind](size, side_rank, generator)
            sides.append(_to(side, like))
        sketches[name] = KroneckerSketch(*sides)
    return Projection(sketches)


def projection_for(
    task: Task, manifest: Manifest, *, kind: Kind, rank: int, seed: int
) -> Projection:
    """The projection of a training's parameters, those of one module next to each other."""
    params = manifest.params
    trained = [name for group in manifest.groups for name in group]
    shapes = {name: params[name].shape for name in by_module(trained)}
    dtypes = [getattr(torch, layout.dtype) for layout in params.values()]
    floating = next(dtype for dtype in dtypes if dtype.is_floating_point)
    like = torch.empty((), dtype=floating, device=task.device)
    return projection(shapes, kind=kind, rank=rank, seed=seed, like=like)


def by_module(names: Iterable[str]) -> list[str]:
    """Order names of parameters so that those of one module are next to each other.

    >>> by_module(["a.weight", "b.weight", "a.bias"])
    ['a.weight', 'a.bias', 'b.weight']
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        modules.setdefault(module, []).append(name)
    return list(chain.from_iterable(modules.values()))


def blocks_of(whole: Projection, *, dense: bool) -> dict[str, tuple[int, int]]:
    """Coordinates [start, stop) that the recursion treats together: each module's, or all."""
    if dense:
        return {"all layers": (0, whole.rank)}
    blocks: dict[str, tuple[int, int]] = {}
    for name, place in whole.layout.items():
        module = name.rpartition(".")[0] or "model"
        start = blocks[module][0] if module in blocks else place.start
        blocks[module] = (start, place.stop)
    return blocks


def ranks_of(sizes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Ranks of a parameter's sides: balanced, none above its size, their product at most `rank`.

    >>> ranks_of((512, 128), 256)
    (16, 16)
    >>> ranks_of((512, 4), 256)
    (64, 4)
    >>> ranks_of((1000,), 256)
    (256,)
    >>> ranks_of((3, 2), 256)
    (3, 2)
    """
    if len(sizes) == 1:
        return (min(sizes[0], rank),)
    left = min(sizes[0], isqrt(rank))
    right = min(sizes[1], rank // left)
    # A small right side leaves room for a larger left one.
    left = min(sizes[0], rank // right)
    return left, right


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _gaussian(size: int, rank: int, generator: torch.Generator) -> Side:
    basis = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return Dense(basis / rank**0.5)


def _orthonormal(size: int, rank: int, generator: torch.Generator) -> Side:
    # A random subspace holds rank / size of a vector's square, so the scale makes it unbiased.
    basis, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
    return Dense(basis * (size / rank) ** 0.5)


def _mask(size: int, rank: int, generator: torch.Generator) -> Side:
    index, _ = torch.randperm(size, generator=generator)[:rank].sort()
    weight = torch.full((rank,), (size / rank) ** 0.5, dtype=torch.float64)
    return Picked(size, index, weight)


def _all_entries(size: int) -> Side:
    return Picked(size, torch.arange(size), torch.ones(size, dtype=torch.float64))


_RANDOM_SIDES: dict[Kind, Callable[[int, int, torch.Generator], Side]] = {
    "gaussian": _gaussian,
    "orthonormal": _orthonormal,
    "mask": _mask,
}


def _to(side: Side, like: Tensor) -> Side:
    """Move a side to the device and precision of `like`; indices keep their type."""
    if isinstance(side, Picked):
        return Picked(side.size, side.index.to(like.device), side.weight.to(like))
    assert isinstance(side, Dense)
    return Dense(side.basis.to(like))


def _picked(side: Side) -> Tensor:
    if not isinstance(side, Picked):
        raise BadSetting("kind", "gaussian or orthonormal", "'mask', to look up single entries")
    return side.index
