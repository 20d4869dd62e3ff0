"""The step log: finished segments as Parquet, and the steps since the last of them as lines of JSON.

A line is appended after every update, so a process that is killed loses no whole step; a torn last
line is ignored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from backtrail.step.state import BatchRecord, Setting, Step

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
    "settings": pl.String,
    "unused": pl.List(pl.String),
    "evaluating": pl.List(pl.String),
    "autocast": pl.String,
}


def table(steps: Sequence[Step]) -> pl.DataFrame:
    """Steps as a table, one row each; lists run over the batches of a step (over the groups for `lr`)."""
    return pl.DataFrame([_row(step) for step in steps], schema=SCHEMA, orient="row")


def _row(step: Step) -> dict[str, object]:
    return {
        "step": step.index,
        "epoch": [fed.epoch for fed in step.fed],
        "lr": [group.get("lr") for group in step.settings],
        "norm": step.norm,
        "samples": [list(fed.samples) for fed in step.fed],
        "digest": [fed.digest for fed in step.fed],
        "random": [fed.random and msgspec.msgpack.encode(fed.random) for fed in step.fed],
        "stored": [fed.stored for fed in step.fed],
        "contributes": [fed.contributes for fed in step.fed],
        "settings": msgspec.json.encode(step.settings).decode(),
        "unused": list(step.unused),
        "evaluating": list(step.evaluating),
        "autocast": step.autocast,
    }


def steps_of(frame: pl.DataFrame) -> list[Step]:
    """The steps that `table` wrote."""
    return [_step(row) for row in frame.iter_rows(named=True)]


def _step(row: dict[str, Any]) -> Step:
    columns = (
        row["samples"],
        row["epoch"],
        row["digest"],
        row["random"],
        row["stored"],
        row["contributes"],
    )
    fed = tuple(
        BatchRecord(
            tuple(samples),
            epoch,
            digest,
            msgspec.msgpack.decode(random) if random else None,
            stored,
            contributes,
        )
        for samples, epoch, digest, random, stored, contributes in zip(*columns, strict=True)
    )
    settings = msgspec.json.decode(row["settings"], type=tuple[dict[str, Setting], ...])
    modes = (
        tuple(row["unused"]),
        tuple(row["evaluating"]),
        row.get("autocast") or "",
    )  # younger than the format
    return Step(row["step"], fed, settings, row["norm"], *modes)


def append(path: Path, step: Step) -> None:
    """Add one step to a journal."""
    with path.open("ab", buffering=0) as file:
        file.write(msgspec.json.encode(step) + b"\n")


def read(path: Path) -> list[Step]:
    """All whole lines of a journal."""
    lines = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(line, type=Step) for line in lines[:-1]]
