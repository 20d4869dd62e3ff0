"""The result of every method, read-only: an array on disk or in memory, and the questions it answers.

Nothing here holds the whole array: sums and tables walk over it shard by shard.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, final, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int64

from backtrail import errors
from backtrail.extras import need
from backtrail.influence import layout, tables
from backtrail.influence.layout import Description
from backtrail.influence.reader import Stored
from backtrail.influence.tables import Order

if TYPE_CHECKING:
    import xarray

State = int | Literal["end"]


@runtime_checkable
class RecordedRun(Protocol):
    """What an influence must know of a run to tell whether it is about that run."""

    @property
    def id(self) -> str:
        """Identifier that was drawn when the recording began."""
        ...

    @property
    def path(self) -> Path:
        """Folder of the recording."""
        ...


def open_influence(path: str | os.PathLike[str]) -> "Influence":
    """Open the folder of a finished attribution.

    Raises:
        UnfinishedInfluence: If it was interrupted.
    """
    folder = Path(path)
    group, description = layout.load(folder)
    done, shards = len(layout.done_shards(folder)), len(description.shards)
    if done < shards:
        raise errors.UnfinishedInfluence(folder, done, shards)
    layout.check_files(folder)
    return Influence(Stored(group, description))


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Influence:
    r"""What each query gains when a sample is removed, by step of the visit and state of the query.

    .. math:: I[q, \tau, t, b] = -\partial q(\theta_\tau) / \partial w_{t,b}

    for a query q that reads the state τ (`observed_at`) and the weight w of the sample in slot b of
    step t; zero at the steps t >= τ. For a loss: positive = helpful, negative = harmful. Wherever a
    query is asked for, its index or its name will do.

    >>> from backtrail.influence.writer import example
    >>> example()
    Influence by example (nats): 2 queries, 2 states (2, 4), 4 steps x 2 slots, 4 samples
    = what the query gains when the sample is removed
      for a loss, positive = helpful, negative = harmful

    Attributes:
        asked: The query object that it answers, where that is at hand.
    """

    _stored: Stored
    asked: object | None = None

    def check_run(self, run: RecordedRun) -> None:
        """Refuse to be used with another run than the one that this influence is about.

        Args:
            run: A recorded run.

        Raises:
            OtherRun: The influence is of another run.
        """
        if self.run != run.id:
            raise errors.OtherRun(self.path, self.run, run=run.path, given=run.id)

    @property
    def description(self) -> Description:
        """Everything about it but the numbers."""
        return self._stored.description

    def with_queries(self, query: object) -> "Influence":
        """Give the same influence, knowing the query object that it answers."""
        return replace(self, asked=query)

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
        """How many steps the run has."""
        return self.description.steps

    @property
    def slots(self) -> int:
        """How many places its largest batch has."""
        return self.description.slots

    @property
    def samples(self) -> int:
        """How many rows the training set has, or how many ids were seen."""
        return self.description.samples

    @property
    def ids(self) -> Int64[np.ndarray, " sample"]:
        """The samples on the axis `sample` of totals, in order: row numbers, or ids where samples have their own."""
        return self._stored.ids()

    @property
    def sign(self) -> str:
        """What a positive number means, as a sentence."""
        return str(self._stored.group.attrs["sign"])

    @property
    def unit(self) -> str:
        """Unit of the queries, and so of the influence."""
        return self.description.unit

    @property
    def method(self) -> str:
        """What computed it."""
        return self.description.method

    @property
    def denominator(self) -> str:
        """What a removal does to the divisor of its batch: "keep" or "renormalize"."""
        return self.description.denominator

    @property
    def run(self) -> str:
        """Identity of the recorded run."""
        return self.description.run

    @property
    def settings(self) -> Mapping[str, object]:
        """What else the numbers depend on."""
        return self.description.settings

    @property
    def path(self) -> Path | None:
        """The folder it lies in; None in memory."""
        return layout.folder(self._stored.group)

    @property
    def sample(self) -> Int64[np.ndarray, "step slot"]:
        """Row of the training set (or id) in every slot; -1 pads a short batch."""
        return layout.read(self._stored.group, "sample", slice(None))

    @property
    def loss(self) -> Float64[np.ndarray, "step slot"]:
        """Training loss of every slot as the method saw it, NaN where unknown."""
        return layout.read(self._stored.group, "loss", slice(None))

    @property
    def growth(self) -> Float64[np.ndarray, "query observed_at"]:
        """How much the query's derivative by the state grew on the way back to the start, at its largest.

        Rounding, and whatever else a sweep gets slightly wrong, grows with it. NaN where the method
        keeps no norms.
        """
        return self._stored.growth()

    def values(
        self, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "query observed_at step slot"]:
        """Read the array itself, for the steps [start, stop)."""
        return layout.read(
            self._stored.group,
            "influence",
            slice(None),
            slice(None),
            slice(start, stop),
            slice(None),
        )

    def total(
        self, *, query: int | str | None = None, out: str | os.PathLike[str] | None = None
    ) -> Float64[np.ndarray, "query observed_at sample"]:
        r"""Sum over all visits of each sample: the influence of never having seen it.

        .. math:: A_{q,\tau,j} = \sum_{t < \tau} \sum_{b:\, S_t[b]=j} I_{q,\tau,t,b}

        A sample never visited has exactly zero.

        >>> from backtrail.influence.writer import example
        >>> example().total()[0].tolist()
        [[-2.0, -2.0, 4.0, 0.0], [3.0, 2.0, -1.0, 0.0]]

        Args:
            query: Sum for this one only, which leaves an axis of length one.
            out: A .npy file to sum into, where the result is too large for memory; it is then
                mapped, not loaded.
        """
        queries = slice(None) if query is None else self._one(query)
        shape = len(self.queries[queries]), len(self.observed_at), self.samples
        if out is not None:
            return self._stored.add_up_in_file(Path(out), queries, shape)
        into = np.zeros(shape)
        self._stored.add_up(into, queries=queries)
        return into

    def window(self, a: int, b: int) -> Float64[np.ndarray, "query sample"]:
        r"""Influence on the change of each query between two states, of never having seen a sample.

        .. math:: A_{q,b,j} - A_{q,a,j}

        Each term is seen from its own state. Not to be confused with `visits(a, b)`, which asks for
        a removal during these steps only, seen from one state.

        >>> from backtrail.influence.writer import example
        >>> example().window(2, 4)[0].tolist()
        [5.0, 4.0, -5.0, 0.0]

        Args:
            a: State at which the window begins; 0 or observed.
            b: State at which it ends; 0 or observed.
        """
        return self._window(slice(None), a, b)

    def visits(
        self, a: int, b: int, *, observed_at: State = "end"
    ) -> Float64[np.ndarray, "query sample"]:
        r"""Influence of the visits in the steps [a, b) alone, seen from one state.

        .. math:: \sum_{a \le t < b} \sum_{b':\, S_t[b']=j} I_{q,\tau,t,b'}

        >>> from backtrail.influence.writer import example
        >>> example().visits(2, 4)[0].tolist()
        [4.0, 3.0, -3.0, 0.0]

        Args:
            a: First step.
            b: The step after the last.
            observed_at: State τ that the query reads; "end" is the last observed one.
        """
        self._check_stretch(a, b)
        return self._seen_from(self._state(observed_at), slice(None), between=(a, b))

    def curve(self, *, sample: int, query: int | str = 0) -> pl.DataFrame:
        """Total influence of one sample by observed state: observed_at, influence; 0 at state 0.

        >>> from backtrail.influence.writer import example
        >>> example().curve(sample=0).rows()
        [(0, 0.0), (2, -2.0), (4, 3.0)]
        """
        tables.places(self.ids, [sample])
        into = np.zeros((1, len(self.observed_at), 1))
        self._stored.add_up(into, queries=self._one(query), only=sample)
        return tables.curve_table(self.observed_at, into[0, :, 0])

    def visits_curve(
        self, *, sample: int, query: int | str = 0, observed_at: State = "end"
    ) -> pl.DataFrame:
        """Each visit of one sample before the observed state: step, slot, influence, loss.

        >>> from backtrail.influence.writer import example
        >>> example().visits_curve(sample=0).rows()
        [(0, 0, 1.0, 1.0), (1, 1, -2.0, 2.0), (3, 0, 4.0, 4.0)]
        """
        tables.places(self.ids, [sample])
        state = self._state(observed_at)
        found = self._stored.visits(sample, query=self._one(query), state=state)
        return pl.concat([tables.NO_VISITS, *found], how="vertical_relaxed")

    def top(
        self,
        k: int = 10,
        *,
        query: int | str = 0,
        order: Order = "harmful",
        window: tuple[int, int] | None = None,
        observed_at: State = "end",
    ) -> pl.DataFrame:
        """List the most influential samples: rank, sample, influence.

        >>> from backtrail.influence.writer import example
        >>> example().top(2).rows()
        [(1, 2, -1.0), (2, 3, 0.0)]
        >>> example().top(1, order="helpful", window=(2, 4)).rows()
        [(1, 0, 5.0)]

        Args:
            k: How many.
            query: Which query.
            order: "harmful" (most negative first), "helpful" (most positive first) or "absolute".
            window: Rank by `window(a, b)` instead of the total.
            observed_at: State that the total is seen from; "end" is the last observed one.

        Raises:
            TwoViewpoints: If both a window and a state are given.
        """
        if window is not None and observed_at != "end":
            raise errors.TwoViewpoints(window, observed_at)
        a, b = (0, self._state(observed_at)) if window is None else window
        return tables.top_table(self._window(self._one(query), a, b)[0], self.ids, k=k, order=order)

    def to_xarray(self) -> "xarray.Dataset":
        """Open it in xarray: variables influence, sample, loss, read when used; needs xarray.

        >>> from backtrail.influence.writer import example
        >>> example().to_xarray()["influence"].sel(query="test loss", observed_at=4).sum().item()
        4.0
        """
        dataset: xarray.Dataset = need("xarray", "xarray").open_dataset(
            self._stored.group.store, engine="zarr", chunks=None
        )
        return dataset

    def to_polars(self) -> pl.DataFrame:
        """List every number: query, observed_at, step, slot, sample, influence.

        Padding and the steps from the observed state on, which are zero, are left out.

        >>> from backtrail.influence.writer import example
        >>> example().to_polars().filter(query="test loss", observed_at=2)["influence"].to_list()
        [2.0, -2.0, 4.0, -4.0]
        """
        return pl.concat(self._stored.long_tables())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table of `to_polars` to a Parquet file, never holding more than a shard of it."""
        self._stored.write_long_table(Path(path))

    def __repr__(self) -> str:
        """Tell method, sizes, unit and sign in three lines."""
        states = f"{len(self.observed_at)} states ({errors.join_items(self.observed_at, most=6)})"
        plain = self.settings.get("exact", True) and "chosen" not in self.settings
        how = "" if plain else layout.told(self.settings)
        return (
            f"Influence by {self.method}{how} ({self.unit}): {len(self.queries)} queries, {states}, "
            f"{self.steps} steps x {self.slots} slots, {self.samples} samples\n= "
            + self.sign.replace("; ", "\n  ")
        )

    def _window(self, queries: slice, a: int, b: int) -> Float64[np.ndarray, "query sample"]:
        self._check_stretch(a, b)
        for state in {a, b} - {0, *self.observed_at}:
            raise errors.NotObserved(state, self.observed_at)
        gained: np.ndarray = self._seen_from(b, queries) - self._seen_from(a, queries)
        return gained

    def _seen_from(
        self, state: int, queries: slice, between: tuple[int, int] | None = None
    ) -> Float64[np.ndarray, "query sample"]:
        into = np.zeros((len(self.queries[queries]), 1, self.samples))
        # State 0 is before all influence, whether it was observed or not.
        if state:
            place = self.observed_at.index(state)
            self._stored.add_up(
                into, queries=queries, states=slice(place, place + 1), between=between
            )
        return into[:, 0]

    def _one(self, query: int | str) -> slice:
        place = self.queries.index(query) if query in self.queries else query
        if isinstance(place, str) or not 0 <= place < len(self.queries):
            raise errors.UnknownQuery(query, self.queries)
        return slice(place, place + 1)

    def _state(self, observed_at: State) -> int:
        if observed_at == "end":
            return self.observed_at[-1]
        if observed_at not in self.observed_at:
            raise errors.NotObserved(observed_at, self.observed_at)
        return observed_at

    def _check_stretch(self, a: int, b: int) -> None:
        if not 0 <= a <= b <= self.steps:
            raise errors.ImpossibleWindow(a, b, self.steps)
