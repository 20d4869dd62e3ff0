"""Parameters cut and joined into flat runs of entries that one call of the optimizer updates alike.

The update of an entry knows nothing of its parameter's shape or name, so many small parameters are
updated, and differentiated, as one vector, and a large one piece by piece: few calls, and memory
that does not grow with the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from backtrail.step.state import COUNTS, State
from backtrail.step.update import Update
from backtrail.tree import Tree

# Entries of a strand. On a processor the dozens of intermediate vectors should stay in its cache;
# elsewhere a strand has to be long enough to outweigh starting a kernel.
ENTRIES = {"cpu": 2**18}
ENTRIES_ELSEWHERE = 2**24


@final
@dataclass(frozen=True, slots=True)
class Slice:
    """The entries [start, stop) of a flattened parameter."""

    name: str
    start: int
    stop: int

    def of(self, stacked: Float[Tensor, "query ..."]) -> Float[Tensor, "query entry"]:
        """A view of these entries in a stack of the parameter's shape."""
        return stacked.view(len(stacked), -1)[:, self.start : self.stop]


@final
@dataclass(frozen=True, slots=True)
class FlatChunk:
    """Spans that one parameter group updates with the same settings and step counts, one after the other."""

    group: int
    spans: tuple[Slice, ...]

    def gather(self, tree: Tree) -> Float[Tensor, " entry"]:
        """The strand's entries as one new vector."""
        return torch.cat(
            [tree[span.name].reshape(-1)[span.start : span.stop] for span in self.spans]
        )

    def parts(self) -> Iterator[tuple[Slice, slice]]:
        """Every span with its place in the strand."""
        first = 0
        for span in self.spans:
            last = first + span.stop - span.start
            yield span, slice(first, last)
            first = last


def flat_chunks(update: Update, state: State, grads: Tree) -> Iterator[FlatChunk]:
    """Cut the parameters that have a gradient into strands."""
    alike: dict[tuple[int, object], list[str]] = {}
    for group, members in enumerate(update.groups):
        for name in (name for name in members if name in grads):
            moments, like = state.moments.get(name, {}), grads[name]
            counts = tuple((key, float(moments[key])) for key in sorted(COUNTS & moments.keys()))
            alike.setdefault((group, (tuple(moments), counts, like.dtype, like.device)), []).append(
                name
            )
    for (group, _), names in alike.items():
        for spans in cut(
            [(name, grads[name].numel()) for name in names], most=longest(grads[names[0]])
        ):
            yield FlatChunk(group, spans)


def longest(like: Tensor) -> int:
    """How many entries a strand may have where this tensor lives."""
    return ENTRIES.get(like.device.type, ENTRIES_ELSEWHERE)


def cut(sizes: Sequence[tuple[str, int]], *, most: int) -> Iterator[tuple[Slice, ...]]:
    """Lay vectors end to end and cut them every `most` entries.

    >>> for spans in cut([("a", 3), ("b", 4)], most=5):
    ...     print(*spans)
    Span(name='a', start=0, stop=3) Span(name='b', start=0, stop=2)
    Span(name='b', start=2, stop=4)
    """
    spans: list[Slice] = []
    room = most
    for name, size in sizes:
        start = 0
        while start < size:
            stop = min(size, start + room)
            spans.append(Slice(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(spans)
                spans, room = [], most
    if spans:
        yield tuple(spans)
