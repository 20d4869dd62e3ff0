"""Parameters cut and joined into flat chunks of entries that one call of the optimizer updates.

The update of an entry does not depend on its parameter's shape or name. So many small parameters
are updated, and differentiated, as one vector, and a large one piece by piece: few calls, and
memory that does not grow with the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from backtrail.step.optimizers import COUNTS
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.tree import Tree

# Entries of a chunk, by type of device. On a CPU the dozens of intermediate vectors should stay in
# its cache; elsewhere a chunk has to be long enough to outweigh the start of a kernel.
CHUNK_ENTRIES = {"cpu": 2**18}
CHUNK_ENTRIES_ELSEWHERE = 2**24


@final
@dataclass(frozen=True, slots=True)
class Slice:
    """The entries [start, stop) of a flattened parameter."""

    name: str
    start: int
    stop: int

    def of(self, stacked: Float[Tensor, "query ..."]) -> Float[Tensor, "query entry"]:
        """View these entries in a contiguous stack of tensors of the parameter's shape."""
        return stacked.view(len(stacked), -1)[:, self.start : self.stop]


@final
@dataclass(frozen=True, slots=True)
class FlatChunk:
    """Entries of several parameters, one slice after the other.

    All of them are in one parameter group, and their moments and step counts agree, so they are
    updated in the same way.
    """

    group: int
    slices: tuple[Slice, ...]

    def gather(self, tree: Tree) -> Shaped[Tensor, " entry"]:
        """Copy the chunk's entries of a tree into one vector."""
        vectors = []
        for part in self.slices:
            flat = tree[part.name].reshape(-1)
            vectors.append(flat[part.start : part.stop])
        return torch.cat(vectors)

    def parts(self) -> Iterator[tuple[Slice, slice]]:
        """Yield every slice with its place in the chunk."""
        first = 0
        for part in self.slices:
            last = first + part.stop - part.start
            yield part, slice(first, last)
            first = last


def flat_chunks(update: Update, state: State, grads: Tree) -> Iterator[FlatChunk]:
    """Cut the parameters that have a gradient into chunks."""
    # Parameters that were first updated at different steps have different counts, by which Adam's
    # bias correction differs.
    alike: dict[tuple[int, object], list[str]] = {}
    for group, members in enumerate(update.groups):
        for name in members:
            if name not in grads:
                continue
            gradient = grads[name]
            moments = state.moments.get(name, {})
            counts = [(key, float(moments[key])) for key in sorted(COUNTS & moments.keys())]
            kind = (tuple(moments), tuple(counts), gradient.dtype, gradient.device)
            alike.setdefault((group, kind), []).append(name)
    for (group, _), names in alike.items():
        sizes = [(name, grads[name].numel()) for name in names]
        for slices in cut(sizes, most=longest_chunk(grads[names[0]])):
            yield FlatChunk(group, slices)


def longest_chunk(tensor: Tensor) -> int:
    """Say how many entries a chunk may have on this tensor's device."""
    return CHUNK_ENTRIES.get(tensor.device.type, CHUNK_ENTRIES_ELSEWHERE)


def cut(sizes: Sequence[tuple[str, int]], *, most: int) -> Iterator[tuple[Slice, ...]]:
    """Lay flattened parameters end to end and cut them every `most` entries.

    >>> for slices in cut([("a", 3), ("b", 4)], most=5):
    ...     print(*slices)
    Slice(name='a', start=0, stop=3) Slice(name='b', start=0, stop=2)
    Slice(name='b', start=2, stop=4)
    """
    slices: list[Slice] = []
    room = most
    for name, size in sizes:
        start = 0
        while start < size:
            stop = min(size, start + room)
            slices.append(Slice(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(slices)
                slices = []
                room = most
    if slices:
        yield tuple(slices)
