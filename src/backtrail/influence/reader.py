"""Reads the arrays of an influence shard by shard: one shard and the result are in memory."""

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
class InfluenceReader:
    """Reads the arrays of an influence."""

    group: zarr.Group
    description: Description

    def ids(self) -> Int64[np.ndarray, " sample"]:
        """All samples, ascending: row numbers, or ids where batches carry ids."""
        if "id" in self.group:
            return layout.read(self.group, "id", ALL)
        return np.arange(self.description.samples)

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
            into: Where to add; has a row for each of `queries` and `states`.
            queries: Positions of the queries.
            states: Positions of the states among the observed ones.
            between: The first step and the one after the last; None adds all.
            only: Add up this sample alone, into rows of length one.
        """
        # The steps from a state on have no influence on it, so their shards need not be read.
        last_state = self.description.observed_at[states][-1]
        start, stop = between or (0, self.description.steps)
        ids = self.ids()
        for first, last in self._ranges(start, min(stop, last_state)):
            steps = slice(first, last)
            sample = layout.read(self.group, "sample", steps)
            if only is None:
                position = np.where(sample < 0, -1, np.searchsorted(ids, sample))
            else:
                position = np.where(sample == only, 0, -1)
            if not (position >= 0).any():
                continue
            block = layout.read(self.group, "influence", queries, states, steps, ALL)
            tables.add_by_sample(into, block, position)

    def add_up_in_file(
        self, out: Path, queries: slice, shape: tuple[int, int, int]
    ) -> Float64[np.ndarray, "query observed_at sample"]:
        """Add up everything in a .npy file, and return it as a read-only memory map.

        Args:
            out: The file.
            queries: Positions of the queries.
            shape: Sizes of [query, observed_at, sample].
        """
        # Renamed when it is complete: a kill leaves no incomplete file.
        scratch = out.with_name(f".{out.name}.{os.getpid()}")
        into = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float64, shape=shape)
        self.add_up(into, queries=queries)
        into.flush()
        # Some systems cannot rename a file that is mapped.
        del into
        scratch.replace(out)
        return np.lib.format.open_memmap(out, mode="r")

    def visits(self, sample: int, *, query: slice, state: int) -> Iterator[pl.DataFrame]:
        """Yield a table of the visits of one sample before a state, for each shard with any.

        Columns: step, slot, influence, loss.
        """
        column = self.description.observed_at.index(state)
        states = slice(column, column + 1)
        for first, last in self._ranges(0, state):
            steps = slice(first, last)
            step, slot = np.nonzero(layout.read(self.group, "sample", steps) == sample)
            if not len(step):
                continue
            block = layout.read(self.group, "influence", query, states, steps, ALL)[0, 0]
            loss = layout.read(self.group, "loss", steps)
            yield pl.DataFrame(
                {
                    "step": step + first,
                    "slot": slot,
                    "influence": block[step, slot],
                    "loss": loss[step, slot],
                }
            )

    def long_tables(self) -> Iterator[pl.DataFrame]:
        """Yield the long table of every shard; see `tables.long_table`."""
        for first, last in self.description.shards:
            yield self._long_table(first, last)

    def write_long_table(self, path: Path) -> None:
        """Write the long table to a Parquet file, one shard at a time."""
        columns = self._long_table(0, 0).schema
        rows = register_io_source(lambda *_: self.long_tables(), schema=columns)
        # Renamed when it is complete: a kill leaves no incomplete file.
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        rows.sink_parquet(scratch)
        scratch.replace(path)

    def growth(self) -> Float64[np.ndarray, "query observed_at"]:
        """Largest norm of each cotangent, divided by its norm at the observed state.

        NaN where the method stored no norms.
        """
        norms = layout.read(self.group, "cotangent", ALL, ALL, ALL)  # [query, observed_at, step]
        last_steps = np.array(self.description.observed_at) - 1
        at_state = norms[:, np.arange(len(last_steps)), last_steps]
        # A cotangent has no norm at the steps after its state.
        largest = np.where(np.isnan(norms), -np.inf, norms).max(axis=2)
        divisor = np.where(at_state > 0, at_state, 1.0)
        return np.where(np.isnan(at_state), np.nan, largest / divisor)

    def standard_errors(self, queries: slice) -> Float64[np.ndarray, "query observed_at sample"]:
        """Standard errors of the totals; NaN where the method stored none."""
        if layout.STANDARD_ERROR in self.group:
            return layout.read(self.group, layout.STANDARD_ERROR, queries)
        about = self.description
        count = len(about.queries[queries])
        return np.full((count, len(about.observed_at), about.samples), np.nan)

    def _long_table(self, first: int, last: int) -> pl.DataFrame:
        steps = slice(first, last)
        return tables.long_table(
            layout.read(self.group, "influence", ALL, ALL, steps, ALL),
            layout.read(self.group, "sample", steps),
            start=first,
            queries=self.description.queries,
            observed_at=self.description.observed_at,
        )

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the part of every shard that lies within the steps [start, stop)."""
        for shard_start, shard_stop in self.description.shards:
            first = max(shard_start, start)
            last = min(shard_stop, stop)
            if first < last:
                yield first, last
