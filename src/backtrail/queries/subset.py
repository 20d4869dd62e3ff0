"""Some of the queries of a larger set."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from backtrail.queries.averaged import Averaged
from backtrail.queries.query import Mode, Part, Query
from backtrail.task.task import Task
from backtrail.tree import Tree


@final
@dataclass(frozen=True, repr=False)
class QuerySubset(Query):
    """The queries with these row numbers of a set; parts that none of them needs are skipped."""

    queries: Query
    rows: tuple[int, ...]
    unit: str = field(init=False)
    mode: Mode = field(init=False)

    def __post_init__(self) -> None:
        """Take unit and mode from the whole set."""
        # The dataclass is frozen, and these two fields follow from another.
        object.__setattr__(self, "unit", self.queries.unit)
        object.__setattr__(self, "mode", self.queries.mode)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names in the whole set."""
        names = self.queries.names
        return tuple(names[row] for row in self.rows)

    def prepare(self, task: Task, *, params: Tree, buffers: Tree) -> None:
        """Prepare the queries themselves."""
        self.queries.prepare(task, params=params, buffers=buffers)

    def parts(self, task: Task, like: Tensor, *, together: bool) -> Iterator[Part]:
        """The parts of the whole set, reduced to the chosen queries."""
        place_of = {row: place for place, row in enumerate(self.rows)}
        for part in self.queries.parts(task, like, together=together):
            wanted = [place for place, row in enumerate(part.queries) if row in place_of]
            if wanted:
                rows = tuple(place_of[part.queries[place]] for place in wanted)
                yield replace(part, queries=rows, weights=part.weights[wanted])

    def __repr__(self) -> str:
        """How many of which queries."""
        return f"QuerySubset({len(self.rows)} of {self.queries!r})"


def evenly_spaced(queries: Query, count: int) -> Query:
    """At most `count` queries, evenly spaced.

    >>> from backtrail.queries.rows import Loss
    >>> evenly_spaced(Loss([(0.0, 0.0)] * 9), 3).names
    ('loss[0]', 'loss[4]', 'loss[8]')
    """
    rows = spread(len(queries.names), count)
    if isinstance(queries, Averaged):
        # The average stays outermost, where methods look for it.
        return replace(queries, queries=QuerySubset(queries.queries, rows))
    return QuerySubset(queries, rows)


def spread(size: int, count: int) -> tuple[int, ...]:
    """At most `count` of `size` places, from the first to the last."""
    if size <= count:
        return tuple(range(size))
    return tuple(round(index * (size - 1) / max(count - 1, 1)) for index in range(count))
