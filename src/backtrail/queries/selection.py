"""Rows of a data set that queries read: which ones, under which names, and in which batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from backtrail import arguments
from backtrail.errors import BadQuery, BadSetting, CoupledRows, join_items
from backtrail.queries.query import Mode, Part
from backtrail.task.coupling import MOST_ROWS, are_rows_coupled
from backtrail.task.task import Batch, Rows, Task
from backtrail.tree import Tree, cast, mapping_to_dict

Aggregate = Literal["mean", "sum"] | None
Collate = Callable[[list[Any]], Batch]
# Maps task, model and batch to `[slot]`, or to `[slot, column]` with several queries per row.
Score = Callable[[Task, nn.Module, Batch], Tensor]


ROWS = 256  # of one forward pass, where the query does not say


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class RowSelection:
    """Rows of a data set, and how they are read.

    Attributes:
        label: what the queries' names begin with.
        data: the data set.
        rows: row numbers.
        columns: what each column of the scores adds to a name; a single one adds nothing.
        aggregate: "mean" or "sum" over the rows; None keeps a query per row.
        mode: mode of the model while it is read.
        collate: makes a batch of rows; None takes the task's.
        batch: rows per forward pass; None for `ROWS`, which then is no decision of the user's.
    """

    label: str
    data: Rows
    rows: tuple[int, ...]
    columns: tuple[str, ...] = ("",)
    aggregate: Aggregate
    mode: Mode
    collate: Collate | None
    batch: int | None

    def __post_init__(self) -> None:
        """Refuse, when the query is made, what would fail or be misread later.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        if self.aggregate is not None:
            arguments.choice("aggregate", self.aggregate, ("mean", "sum"), "None")
        arguments.choice("mode", self.mode, get_args(Mode))
        if self.collate is not None:
            arguments.function("collate", self.collate, "a function of a list of rows, or None")
        batch = arguments.positive_or_none("batch", self.batch)
        # The dataclass is frozen. numpy's and torch's numbers become plain ones.
        object.__setattr__(self, "batch", batch)
        names = self.names
        if len(set(names)) < len(names):
            raise BadSetting("samples", self.rows, "samples that are all different, or aggregate=")

    @property
    def names(self) -> tuple[str, ...]:
        """Like `loss[17]`, or `mean loss of 200`."""
        if self.aggregate is not None:
            count = len(self.rows)
            return tuple(
                f"{self.aggregate} {self.label}{column} of {count}" for column in self.columns
            )
        return tuple(f"{self.label}{column}[{row}]" for row in self.rows for column in self.columns)

    def parts(
        self,
        task: Task,
        like: Tensor,
        *,
        together: bool,
        score: Score,
        check: Callable[[Batch], object] | None = None,
    ) -> Iterator[Part]:
        """Blocks of rows; single rows where each one is a query that is differentiated.

        Rows that depend on one another are always read in the same blocks: in train mode they
        share BatchNorm's statistics.

        Args:
            task: as for every query.
            like: as for every query.
            together: as for every query.
            score: what the model is asked about a batch.
            check: reads a batch before it is stacked with others under `vmap`, where its values
                cannot be read any more; raises an error where it is not what `score` needs.
        """
        whole = self.mode == "train" or task.binding.coupled.get(self, False)
        alone = not (together or self.aggregate or whole)
        rows_at_once = self.batch or ROWS
        size = 1 if alone else rows_at_once
        at_once = rows_at_once if alone else 1
        width = len(self.columns)
        collate = self.collate or task.collate

        def numbers(model: nn.Module, batch: Batch) -> Tensor:
            return score(task, model, cast(batch, like.dtype, like.device)).flatten()

        for first in range(0, len(self.rows), size):
            rows = self.rows[first : first + size]
            batch = mapping_to_dict(collate([self.data[row] for row in rows]))
            if check is not None:
                check(batch)
            identity = torch.eye(len(rows) * width, dtype=torch.float64)
            if self.aggregate is None:
                queries = range(first * width, (first + len(rows)) * width)
                yield Part(tuple(queries), identity, numbers, batch, at_once)
            else:
                # Column by column, the sum over the rows of this block.
                weights = identity.view(len(rows), width, -1).sum(0)
                if self.aggregate == "mean":
                    weights /= len(self.rows)
                yield Part(tuple(range(width)), weights, numbers, batch)

    def prepare(self, task: Task, params: Tree, buffers: Tree, *, score: Score) -> None:
        """Find out, once for a task, whether the scores of rows depend on one another.

        Raises:
            CoupledRows: they do, and it is not known which rows belong together.
        """
        if self.mode == "train" or self in task.binding.coupled:
            return
        # One row alone is compared with others of the data set.
        others = [row for row in range(min(len(self.data), MOST_ROWS)) if row not in self.rows]
        rows = (*self.rows, *others)[:MOST_ROWS]
        found = False
        batch = self._batch_of(rows, task)
        if batch is not None:
            like = next(iter(params.values()))
            found = are_rows_coupled(
                task,
                cast(batch, like.dtype, like.device),
                partial(score, task),
                params=params,
                buffers=buffers,
            )
        if found:
            self._refuse_groups_of_no_meaning()
        task.binding.coupled[self] = found

    def _batch_of(self, rows: Sequence[int], task: Task) -> Batch | None:
        """A batch of rows; None where they cannot share one (sequences of several lengths)."""
        items = [self.data[row] for row in rows]
        try:
            return mapping_to_dict((self.collate or task.collate)(items))
        except (RuntimeError, ValueError, TypeError):
            return None

    def _refuse_groups_of_no_meaning(self) -> None:
        size = self.batch or ROWS
        count = len(self.rows)
        if min(size, count) == 1:
            raise CoupledRows(
                f"The {self.label}",
                "A row alone has none. Give samples= all rows that belong together, and batch= "
                "their number",
            )
        if self.batch is None and count > size:
            raise CoupledRows(
                f"The {self.label}",
                f"Give batch=, how many of the {count} rows are read together, for example the "
                "size of a batch in training",
            )

    def describe(self, kind: str, settings: Mapping[str, str]) -> str:
        """One line for the `repr` of a query of this kind; never shows the data."""
        plural = "s" if len(self.rows) > 1 else ""
        options = dict(settings) | {"aggregate": repr(self.aggregate)}
        if self.mode != "eval":
            options["mode"] = repr(self.mode)
        shown = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{kind}({len(self.rows)} sample{plural}: {join_items(self.rows, most=6)}; {shown})"


def chosen_rows(data: Rows, samples: Sequence[int] | None) -> tuple[int, ...]:
    """Row numbers of the samples; of all rows where there are none given.

    Raises:
        BadSetting: the data set or the samples are something else.
        BadQuery: the data set does not have these rows, or there are none.
    """
    expected = "a map-style data set (with __len__ and __getitem__), or a list of rows"
    size = arguments.count_rows("data", data, expected)
    if samples is None:
        rows = tuple(range(size))
    else:
        expected = "one or more row numbers, or None for all rows"
        rows = tuple(arguments.whole_numbers("samples", samples, least=None, expected=expected))
    missing = [row for row in rows if not 0 <= row < size]
    if missing:
        raise BadQuery(f"samples=[{join_items(missing, most=6)}]", f"the data set has {size} rows")
    if not rows:
        raise BadQuery("no samples", f"the data set has {size} rows")
    return rows
