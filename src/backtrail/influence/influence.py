"""`Influence`, the read-only result of every method, on disk or in memory.

Nothing here holds the whole array: sums and tables are computed shard by shard.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, final, get_args, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int64

from backtrail import arguments, errors
from backtrail.extras import need
from backtrail.influence import layout, tables
from backtrail.influence.layout import Description
from backtrail.influence.reader import InfluenceReader
from backtrail.influence.tables import Order

if TYPE_CHECKING:
    import xarray

ObservedState = int | Literal["end"]  # a state number, or the last observed state


@runtime_checkable
class RecordedRun(Protocol):
    """What `Influence.check_run` needs of a recorded run; `backtrail.Run` has it."""

    @property
    def id(self) -> str:
        """Random identifier of the run."""
        ...

    @property
    def path(self) -> Path:
        """Folder of the run."""
        ...


def open_influence(path: str | os.PathLike[str]) -> "Influence":
    """Open the folder of a finished attribution.

    The files are opened, not read: each question to the influence reads the shards that it needs.

    Args:
        path: The folder that `attribute(out=...)` wrote.

    Raises:
        NotAnInfluence: The folder holds no influence, or one of another format.
        UnfinishedInfluence: The attribution was interrupted.
        DamagedInfluence: A file is missing or has another size than when it was written.
    """
    folder = arguments.path("path", path)
    group, description = layout.load(folder)
    done = len(layout.done_shards(folder))
    shards = len(description.shards)
    if done < shards:
        raise errors.UnfinishedInfluence(folder, done, shards)
    layout.check_files(folder)
    return Influence(InfluenceReader(group, description))


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Influence:
    r"""What each query gains when a sample is removed, by step of the visit and state of the query.

    .. math:: I[q, \tau, t, b] = -\partial q(\theta_\tau) / \partial w_{t,b}

    for a query q that reads the state τ (`observed_at`) and the weight w of the sample in slot b of
    step t; zero at the steps t >= τ. Unit: that of the query (nats for a cross-entropy loss). Sign:
    for a loss, positive = helpful, negative = harmful. Methods that take a `query` accept its
    index or its name.

    >>> from backtrail.influence.writer import example
    >>> example()
    Influence by example (nats): 2 queries, 2 states (2, 4), 4 steps x 2 slots, 4 samples
    = what the query gains when the sample is removed
      for a loss, positive = helpful, negative = harmful

    Attributes:
        query_object: The query object that was attributed, such as a `backtrail.Loss`; None in an
            influence that was opened from a folder.
    """

    _reader: InfluenceReader
    query_object: object | None = None

    def check_run(self, run: RecordedRun) -> None:
        """Check that this influence was computed from a run.

        Args:
            run: A recorded run.

        Raises:
            BadSetting: It is something else.
            OtherRun: The influence was computed from another run.
        """
        arguments.instance("run", run, RecordedRun, "a run, as backtrail.open_run returns it")  # type: ignore[type-abstract]
        if self.run != run.id:
            raise errors.OtherRun(self.path, self.run, run=run.path, given=run.id)

    @property
    def description(self) -> Description:
        """Everything about the influence except its arrays."""
        return self._reader.description

    def with_queries(self, query: object) -> "Influence":
        """Return the same influence with its query object, so that checks can evaluate it again."""
        return replace(self, query_object=query)

    @property
    def queries(self) -> tuple[str, ...]:
        """Name of each query."""
        return self.description.queries

    @property
    def observed_at(self) -> tuple[int, ...]:
        """States that the queries read, ascending; state t is the one before update t."""
        return self.description.observed_at

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.description.steps

    @property
    def slots(self) -> int:
        """Number of slots of the largest batch."""
        return self.description.slots

    @property
    def samples(self) -> int:
        """Number of rows of the training set, or of distinct ids where batches carry ids."""
        return self.description.samples

    @property
    def ids(self) -> Int64[np.ndarray, " sample"]:
        """The samples on the axis `sample` of totals, ascending: row numbers, or ids."""
        return self._reader.ids()

    @property
    def sign(self) -> str:
        """What a positive number means, as a sentence."""
        return str(self._reader.group.attrs["sign"])

    @property
    def unit(self) -> str:
        """Unit of the queries, and so of the influence."""
        return self.description.unit

    @property
    def method(self) -> str:
        """Name of the method that computed it."""
        return self.description.method

    @property
    def denominator(self) -> str:
        """What a removal does to the divisor of its batch: "keep" or "renormalize"."""
        return self.description.denominator

    @property
    def run(self) -> str:
        """Identifier of the recorded run."""
        return self.description.run

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings of the method that the numbers depend on."""
        return self.description.settings

    @property
    def path(self) -> Path | None:
        """Folder of the influence; None in memory."""
        return layout.folder(self._reader.group)

    @property
    def sample(self) -> Int64[np.ndarray, "step slot"]:
        """Row of the training set (or id) in every slot; -1 pads a short batch."""
        return layout.read(self._reader.group, "sample", slice(None))

    @property
    def loss(self) -> Float64[np.ndarray, "step slot"]:
        """Training loss of every slot as the method computed it, NaN where unknown."""
        return layout.read(self._reader.group, "loss", slice(None))

    @property
    def growth(self) -> Float64[np.ndarray, "query observed_at"]:
        """How much the derivative of a query by the state grows on the way back to step 0.

        The largest norm of the derivative, divided by its norm at the observed state. Rounding, and
        every other error of a backward sweep, grows by up to the same factor. NaN where the method
        stores no norms.
        """
        return self._reader.growth()

    def values(
        self, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "query observed_at step slot"]:
        """Read the array itself.

        Args:
            start: First step.
            stop: The step after the last; None reads to the end.

        Raises:
            ImpossibleWindow: It is not 0 <= start <= stop <= steps.
        """
        every = slice(None)
        last = self.steps if stop is None else stop
        first, last = arguments.step_range("(start, stop)", (start, last), self.steps)
        steps = slice(first, last)
        return layout.read(self._reader.group, "influence", every, every, steps, every)

    def total(
        self, *, query: int | str | None = None, out: str | os.PathLike[str] | None = None
    ) -> Float64[np.ndarray, "query observed_at sample"]:
        r"""Sum over all visits of each sample: the influence of never having seen it.

        .. math:: A_{q,\tau,j} = \sum_{t < \tau} \sum_{b:\, S_t[b]=j} I_{q,\tau,t,b}

        A sample that was never visited has exactly zero.

        >>> from backtrail.influence.writer import example
        >>> example().total()[0].tolist()
        [[-2.0, -2.0, 4.0, 0.0], [3.0, 2.0, -1.0, 0.0]]

        Args:
            query: Sum for this query alone; the axis then has length one. None sums for all.
            out: A .npy file to sum into, where the result is too large for memory. The result is
                then a read-only memory map.

        Raises:
            UnknownQuery: There is no such query.
        """
        queries = slice(None) if query is None else self._query_slice(query)
        shape = (len(self.queries[queries]), len(self.observed_at), self.samples)
        if out is not None:
            file = arguments.file("out", out, (".npy",))
            return self._reader.add_up_in_file(file, queries, shape)
        totals = np.zeros(shape)
        self._reader.add_up(totals, queries=queries)
        return totals

    def standard_error(
        self, *, query: int | str | None = None
    ) -> Float64[np.ndarray, "query observed_at sample"]:
        r"""Standard error of each total, for a method that estimates it from several trainings.

        .. math:: s_j / \sqrt{n_j}

        with :math:`s_j` the standard deviation (with :math:`n_j - 1` in its divisor) of the
        :math:`n_j` estimates whose mean the total is. It is that of independent estimates. Those of
        `PathIntegrated` are stratified, so its standard errors are usually too large rather than
        too small. With two estimates a standard error is itself uncertain by a factor of two or
        more. NaN with one estimate, and for methods that do not sample.

        >>> from backtrail.influence.writer import example
        >>> example().standard_error(query=0).shape
        (1, 2, 4)

        Args:
            query: Index or name of one query; the axis then has length one. None reads all.

        Raises:
            UnknownQuery: There is no such query.
        """
        queries = slice(None) if query is None else self._query_slice(query)
        return self._reader.standard_errors(queries)

    def window(self, a: int, b: int) -> Float64[np.ndarray, "query sample"]:
        r"""Influence of each sample on the change of each query between two states.

        .. math:: A_{q,b,j} - A_{q,a,j}

        The sample is removed from the whole training, and each term is read at its own state. Not
        to be confused with `visits(a, b)`, the influence of a removal during these steps only, read
        at one state.

        >>> from backtrail.influence.writer import example
        >>> example().window(2, 4)[0].tolist()
        [5.0, 4.0, -5.0, 0.0]

        Args:
            a: State at which the window begins; 0 or an observed state.
            b: State at which it ends; 0 or an observed state.

        Raises:
            ImpossibleWindow: It is not 0 <= a <= b <= steps.
            NotObserved: No query reads one of these states.
        """
        return self._window(slice(None), a, b)

    def visits(
        self, a: int, b: int, *, observed_at: ObservedState = "end"
    ) -> Float64[np.ndarray, "query sample"]:
        r"""Influence of the visits in the steps [a, b) alone, read at one state.

        .. math:: \sum_{a \le t < b} \sum_{b':\, S_t[b']=j} I_{q,\tau,t,b'}

        >>> from backtrail.influence.writer import example
        >>> example().visits(2, 4)[0].tolist()
        [4.0, 3.0, -3.0, 0.0]

        Args:
            a: First step.
            b: The step after the last.
            observed_at: State τ that the query reads; "end" is the last observed one.

        Raises:
            ImpossibleWindow: It is not 0 <= a <= b <= steps.
            NotObserved: No query reads that state.
        """
        between = arguments.step_range("(a, b)", (a, b), self.steps)
        return self._total_at(self.observed_state(observed_at), slice(None), between=between)

    def curve(self, *, sample: int, query: int | str = 0) -> pl.DataFrame:
        """Table of one sample's total influence by observed state: observed_at, influence.

        It begins with state 0, where the influence is 0.

        >>> from backtrail.influence.writer import example
        >>> example().curve(sample=0).rows()
        [(0, 0.0), (2, -2.0), (4, 3.0)]

        Args:
            sample: Row of the training set, or id.
            query: Index or name of the query.

        Raises:
            UnknownSample: There is no such row.
            UnknownId: There is no such id.
            NeverTrainedOn: The sample was in no batch.
            UnknownQuery: There is no such query.
        """
        sample = self._trained_sample(sample)
        totals = np.zeros((1, len(self.observed_at), 1))
        self._reader.add_up(totals, queries=self._query_slice(query), only=sample)
        return tables.curve_table(self.observed_at, totals[0, :, 0])

    def visits_curve(
        self, *, sample: int, query: int | str = 0, observed_at: ObservedState = "end"
    ) -> pl.DataFrame:
        """Table of each visit of one sample before the observed state: step, slot, influence, loss.

        >>> from backtrail.influence.writer import example
        >>> example().visits_curve(sample=0).rows()
        [(0, 0, 1.0, 1.0), (1, 1, -2.0, 2.0), (3, 0, 4.0, 4.0)]

        Args:
            sample: Row of the training set, or id.
            query: Index or name of the query.
            observed_at: State that the query reads; "end" is the last observed one.

        Raises:
            UnknownSample: There is no such row.
            UnknownId: There is no such id.
            NeverTrainedOn: The sample was in no batch.
            UnknownQuery: There is no such query.
            NotObserved: No query reads that state.
        """
        sample = self._trained_sample(sample)
        state = self.observed_state(observed_at)
        visits = self._reader.visits(sample, query=self._query_slice(query), state=state)
        # The empty table has the columns of a sample that was never visited.
        return pl.concat([tables.NO_VISITS, *visits], how="vertical_relaxed")

    def top(
        self,
        k: int = 10,
        *,
        query: int | str = 0,
        order: Order = "harmful",
        window: tuple[int, int] | None = None,
        observed_at: ObservedState = "end",
    ) -> pl.DataFrame:
        """Table of the most influential samples: rank, sample, influence.

        >>> from backtrail.influence.writer import example
        >>> example().top(2).rows()
        [(1, 2, -1.0), (2, 3, 0.0)]
        >>> example().top(1, order="helpful", window=(2, 4)).rows()
        [(1, 0, 5.0)]

        Args:
            k: Number of samples.
            query: Index or name of the query.
            order: "harmful" (most negative first), "helpful" (most positive first) or "absolute".
            window: Rank by `window(a, b)` instead of the total.
            observed_at: State at which the total is read; "end" is the last observed one.

        Raises:
            TwoViewpoints: Both a window and a state are given.
            UnknownQuery: There is no such query.
            ImpossibleWindow: The window is not 0 <= a <= b <= steps.
            NotObserved: No query reads one of the states.
        """
        k = arguments.whole("k", k, least=1)
        arguments.choice("order", order, get_args(Order))
        state = self.observed_state(observed_at)
        if window is None:
            # At state 0 all influence is zero, so a total is the window that begins there.
            a, b = 0, state
        else:
            a, b = arguments.step_range("window", window, self.steps)
            if not isinstance(observed_at, str):
                raise errors.TwoViewpoints((a, b), observed_at)
        scores = self._window(self._query_slice(query), a, b)[0]
        return tables.top_table(scores, self.ids, k=k, order=order)

    def to_xarray(self) -> "xarray.Dataset":
        """Open the influence in xarray: variables influence, sample and loss, read when used.

        Needs `pip install 'backtrail[xarray]'`.

        >>> from backtrail.influence.writer import example
        >>> example().to_xarray()["influence"].sel(query="test loss", observed_at=4).sum().item()
        4.0

        Raises:
            MissingExtra: xarray is not installed.
        """
        dataset: xarray.Dataset = need("xarray", "xarray").open_dataset(
            self._reader.group.store, engine="zarr", chunks=None
        )
        return dataset

    def to_polars(self) -> pl.DataFrame:
        """Table with one row per number: query, observed_at, step, slot, sample, influence.

        Padding and the steps from the observed state on, which are zero, are left out.

        >>> from backtrail.influence.writer import example
        >>> example().to_polars().filter(query="test loss", observed_at=2)["influence"].to_list()
        [2.0, -2.0, 4.0, -4.0]
        """
        return pl.concat(self._reader.long_tables())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table of `to_polars` to a Parquet file, one shard at a time.

        Args:
            path: The file; an existing one is replaced.
        """
        self._reader.write_long_table(arguments.file("path", path))

    def __repr__(self) -> str:
        """Three lines: method, unit and sizes; the meaning of a positive number; the sign."""
        count_of = errors.count_of
        observed = errors.join_items(self.observed_at, most=6)
        states = f"{count_of(len(self.observed_at), 'state')} ({observed})"
        # The settings distinguish results only where they are not the default, exact sweep.
        is_default = self.settings.get("exact", True) and "chosen" not in self.settings
        settings = "" if is_default else layout.describe_settings(self.settings)
        meaning = self.sign.replace("; ", "\n  ")
        return (
            f"Influence by {self.method}{settings} ({self.unit}): "
            f"{count_of(len(self.queries), 'query')}, {states}, {count_of(self.steps, 'step')} x "
            f"{count_of(self.slots, 'slot')}, {count_of(self.samples, 'sample')}\n"
            f"= {meaning}"
        )

    def _window(self, queries: slice, a: int, b: int) -> Float64[np.ndarray, "query sample"]:
        a, b = arguments.step_range("(a, b)", (a, b), self.steps)
        for state in {a, b} - {0, *self.observed_at}:
            raise errors.NotObserved(state, self.observed_at)
        difference: np.ndarray = self._total_at(b, queries) - self._total_at(a, queries)
        return difference

    def _total_at(
        self, state: int, queries: slice, between: tuple[int, int] | None = None
    ) -> Float64[np.ndarray, "query sample"]:
        """Total influence at one state, of all steps or of the steps [start, stop) in `between`."""
        totals = np.zeros((len(self.queries[queries]), 1, self.samples))
        # State 0 is before all influence, whether it was observed or not.
        if state == 0:
            return totals[:, 0]
        column = self.observed_at.index(state)
        states = slice(column, column + 1)
        self._reader.add_up(totals, queries=queries, states=states, between=between)
        return totals[:, 0]

    def _query_slice(self, query: int | str) -> slice:
        """The position of one query, as a slice that keeps its axis.

        Raises:
            UnknownQuery: There is no such query.
        """
        index = self.query_index(query)
        return slice(index, index + 1)

    def query_index(self, query: int | str) -> int:
        """The number of a query.

        Args:
            query: Its name, or the number itself.

        Raises:
            BadSetting: It is neither a name nor a number.
            UnknownQuery: There is no such query.
        """
        if isinstance(query, str):
            if query not in self.queries:
                raise errors.UnknownQuery(query, self.queries)
            return self.queries.index(query)
        expected = "the index or the name of a query"
        index = arguments.whole("query", query, expected=expected)
        if not 0 <= index < len(self.queries):
            raise errors.UnknownQuery(index, self.queries)
        return index

    def observed_state(self, observed_at: ObservedState) -> int:
        """The number of an observed state.

        Args:
            observed_at: The number itself, or "end" for the last observed state.

        Raises:
            BadSetting: It is neither "end" nor a number.
            NotObserved: No query reads that state.
        """
        if isinstance(observed_at, str) and observed_at == "end":
            return self.observed_at[-1]
        expected = "'end' or the number of an observed state"
        state = arguments.whole("observed_at", observed_at, expected=expected)
        if state not in self.observed_at:
            raise errors.NotObserved(state, self.observed_at)
        return state

    def _trained_sample(self, sample: int) -> int:
        """A sample that was in some batch.

        Raises:
            BadSetting: It is no whole number.
            UnknownSample: There is no such row.
            UnknownId: There is no such id.
            NeverTrainedOn: It was in no batch.
        """
        number = arguments.whole("sample", sample)
        tables.places(self.ids, [number])  # refuses unknown samples
        table = self.sample
        if not (table == number).any():
            seen = np.unique(table[table >= 0])
            raise errors.NeverTrainedOn([number], len(seen))
        return number
