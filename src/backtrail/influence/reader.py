"""The arrays of an influence, read shard by shard: held is never more than one shard and the result."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import zarr
from jaxtyping import Float64, Int64
from polars.io.plugins import register_io_source

from backtrail.influence import layout, tables
from backtrail.influence.layout import Description

ALL = slice(None)


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """Reads the arrays of an influence."""

    group: zarr.Group
    description: Description

    def ids(self) -> Int64[np.ndarray, " sample"]:
        """All samples in order: row numbers, or ids where samples have their own."""
        return (
            layout.read(self.group, "id", ALL)
            if "id" in self.group
            else np.arange(self.description.samples)
        )

    def add_up(
        self,
        into: Float64[np.ndarray, "query observed_at sample"],
        *,
        queries: slice,
        states: slice = ALL,
        between: tuple[int, int] | None = None,
        only: int | None = None,
    ) -> None:
        """Add the influence of every slot to that of the sample in it.

        Args:
            into: Where to add; a row for each of `queries` and `states`.
            queries: Places of the queries.
            states: Places of the states among those observed.
            between: The first step and the one after the last; all, if None.
            only: Add up this sample alone, into rows of length one.
        """
        # The steps from a state on have no influence on it.
        seen_from = self.description.observed_at[states][-1]
        start, stop = between or (0, self.description.steps)
        ids = self.ids()
        for first, last in self._stretches(start, min(stop, seen_from)):
            sample = layout.read(self.group, "sample", slice(first, last))
            if only is not None:
                sample = np.where(sample == only, 0, -1)
            else:
                sample = np.where(sample < 0, -1, np.searchsorted(ids, sample))
            if (sample >= 0).any():
                steps = slice(first, last)
                block = layout.read(self.group, "influence", queries, states, steps, ALL)
                tables.add_by_sample(into, block, sample)

    def add_up_in_file(
        self, out: Path, queries: slice, shape: tuple[int, int, int]
    ) -> Float64[np.ndarray, "query observed_at sample"]:
        """Add up everything in a .npy file, and map it, read-only."""
        # A kill leaves either no file or a whole one.
        scratch = out.with_name(f".{out.name}.{os.getpid()}")
        into = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float64, shape=shape)
        self.add_up(into, queries=queries)
        into.flush()
        del into
        scratch.replace(out)
        return np.lib.format.open_memmap(out, mode="r")

    def visits(self, sample: int, *, query: slice, state: int) -> Iterator[pl.DataFrame]:
        """Yield the visits of one sample before a state, a table for each shard that has some."""
        column = self.description.observed_at.index(state)
        for first, last in self._stretches(0, state):
            steps = slice(first, last)
            step, slot = np.nonzero(layout.read(self.group, "sample", steps) == sample)
            if len(step):
                block = layout.read(
                    self.group, "influence", query, slice(column, column + 1), steps, ALL
                )[0, 0]
                loss = layout.read(self.group, "loss", steps)
                numbers = {"influence": block[step, slot], "loss": loss[step, slot]}
                yield pl.DataFrame({"step": step + first, "slot": slot, **numbers})

    def long_tables(self) -> Iterator[pl.DataFrame]:
        """Yield the long table of every shard."""
        for first, last in self.description.shards:
            yield self._long_table(first, last)

    def write_long_table(self, path: Path) -> None:
        """Write the long table to a Parquet file, a shard at a time."""
        columns = self._long_table(0, 0).schema
        rows = register_io_source(lambda *_: self.long_tables(), schema=columns)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        rows.sink_parquet(scratch)
        scratch.replace(path)

    def growth(self) -> Float64[np.ndarray, "query observed_at"]:
        """Divide the largest norm of each cotangent by its first, the one at its observed state."""
        norms = layout.read(self.group, "cotangent", ALL, ALL, ALL)
        last = np.array(self.description.observed_at) - 1
        first = norms[:, np.arange(len(last)), last]
        largest = np.where(np.isnan(norms), -np.inf, norms).max(axis=2)
        return np.where(np.isnan(first), np.nan, largest / np.where(first > 0, first, 1.0))

    def _long_table(self, first: int, last: int) -> pl.DataFrame:
        steps = slice(first, last)
        return tables.long_table(
            layout.read(self.group, "influence", ALL, ALL, steps, ALL),
            layout.read(self.group, "sample", steps),
            start=first,
            queries=self.description.queries,
            observed_at=self.description.observed_at,
        )

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the part of every shard that lies within the steps [start, stop)."""
        for first, last in self.description.shards:
            if max(first, start) < min(last, stop):
                yield max(first, start), min(last, stop)
