"""The step log: finished segments are Parquet files, the steps since the last are lines of JSON.

A line is appended after every update, so a process that is killed loses no completed step. It may
leave an incomplete last line, which is ignored.
"""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from backtrail.step.state import BatchRecord, Setting, Step

# One row per step. Lists run over the micro-batches of the step, `lr` over its parameter groups,
# `unused` and `evaluating` over names.
SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "step": pl.Int64,
    "epoch": pl.List(pl.Int64),
    "lr": pl.List(pl.Float64),
    "norm": pl.Float64,
    "samples": pl.List(pl.List(pl.Int64)),
    "digest": pl.List(pl.String),
    "random": pl.List(pl.Binary),
    "stored": pl.List(pl.Boolean),
    "contributes": pl.List(pl.Boolean),
    "may_depend_on_model": pl.List(pl.Boolean),
    "settings": pl.String,
    "unused": pl.List(pl.String),
    "evaluating": pl.List(pl.String),
    "autocast": pl.String,
}


def to_table(steps: Sequence[Step]) -> pl.DataFrame:
    """Convert steps to a table with one row each; see `SCHEMA`."""
    return pl.DataFrame([_to_row(step) for step in steps], schema=SCHEMA, orient="row")


def _to_row(step: Step) -> dict[str, object]:
    return {
        "step": step.index,
        "epoch": [record.epoch for record in step.fed],
        # Repeated from `settings`, so that a table can be plotted without decoding them.
        "lr": [group.get("lr") for group in step.settings],
        "norm": step.norm,
        "samples": [list(record.samples) for record in step.fed],
        "digest": [record.digest for record in step.fed],
        "random": [_encode_random(record.random) for record in step.fed],
        "stored": [record.stored for record in step.fed],
        "contributes": [record.contributes for record in step.fed],
        "may_depend_on_model": [record.may_depend_on_model for record in step.fed],
        "settings": msgspec.json.encode(step.settings).decode(),
        "unused": list(step.unused),
        "evaluating": list(step.evaluating),
        "autocast": step.autocast,
    }


def _encode_random(random: dict[str, bytes] | None) -> bytes | None:
    return msgspec.msgpack.encode(random) if random else None


def from_table(frame: pl.DataFrame) -> list[Step]:
    """Convert a table that `to_table` made back to steps."""
    return [_from_row(row) for row in frame.iter_rows(named=True)]


def _from_row(row: dict[str, Any]) -> Step:
    records: list[BatchRecord] = []
    # Earlier runs have no such column.
    may_depend = row.get("may_depend_on_model") or [False] * len(row["samples"])
    for place, samples in enumerate(row["samples"]):
        random = row["random"][place]
        record = BatchRecord(
            samples=tuple(samples),
            epoch=row["epoch"][place],
            digest=row["digest"][place],
            random=msgspec.msgpack.decode(random) if random else None,
            stored=row["stored"][place],
            contributes=row["contributes"][place],
            may_depend_on_model=may_depend[place],
        )
        records.append(record)
    return Step(
        index=row["step"],
        fed=tuple(records),
        settings=msgspec.json.decode(row["settings"], type=tuple[dict[str, Setting], ...]),
        norm=row["norm"],
        unused=tuple(row["unused"]),
        evaluating=tuple(row["evaluating"]),
        # The first runs have no such column.
        autocast=row.get("autocast") or "",
    )


def append(path: Path, step: Step) -> None:
    """Append one step to a journal.

    Raises:
        OSError: the disk is full.
    """
    # Unbuffered: the line is handed to the operating system in one write, which survives the
    # process.
    line = msgspec.json.encode(step) + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        written = file.write(line)
        if written != len(line):
            # A full disk takes a part of a write. Later lines would follow a torn one.
            file.truncate(before)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written", path)


def read(path: Path) -> list[Step]:
    """Read the steps of a journal, without an incomplete last line."""
    # What follows the last newline is empty, or a line that was being written.
    lines = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(line, type=Step) for line in lines[:-1]]
