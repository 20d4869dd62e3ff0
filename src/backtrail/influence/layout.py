"""How an influence lies on disk: one zarr 3 group, and a done-mark per shard beside it.

    influence  [query, observed_at, step, slot]   one zarr shard per `shard` steps
    sample     [step, slot]                       row of the training set (or id), -1 pads a short batch
    id         [id]                               all samples in order, where they have ids of their own
    loss       [step, slot]                       training loss of each slot, NaN where unknown
    cotangent  [query, observed_at, step]         norm of the query's derivative by the state before the step, if known
    query, observed_at, step                      coordinates, so that xarray shows names
    done/000000.json                              the files of a finished shard and their sizes

Every chunk carries a checksum. In memory it is the same group without the marks.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, final

import msgspec
import numpy as np
import zarr
from jaxtyping import Int
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from backtrail.errors import DamagedInfluence, IllFormedInfluence, NotAnInfluence, join_items

FORMAT, VERSION = "backtrail influence", 1
SIGN = "what the query gains when the sample is removed; for a loss, positive = helpful, negative = harmful"
AXES = ("query", "observed_at", "step", "slot")
# Reading one query or one state should not unpack the others; a chunk costs about a millisecond.
CHUNK_BYTES = 2**20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Everything about an influence but its numbers.

    Attributes:
        method: What computed it, for example "DIT".
        unit: Unit of the query, for example "nats".
        denominator: "keep" or "renormalize", what a removal does to the divisor of its batch.
        run: Identity of the recorded run.
        queries: Name of each query, no two alike.
        observed_at: States that the queries read, ascending; state t is the one before update t.
        steps: How many steps the run has.
        slots: How many places its largest batch has.
        samples: How many rows the training set has, or how many ids were seen.
        shard: How many consecutive steps are written, and marked done, together.
        settings: What else the numbers depend on; JSON values only.
    """

    method: str
    unit: str
    denominator: str
    run: str
    queries: tuple[str, ...]
    observed_at: tuple[int, ...]
    steps: int
    slots: int
    samples: int
    shard: int
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes of [query, observed_at, step, slot]."""
        return len(self.queries), len(self.observed_at), self.steps, self.slots

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First step, and the one after the last, of each shard."""
        starts = range(0, self.steps, self.shard)
        return [(start, min(start + self.shard, self.steps)) for start in starts]

    def differences(self, other: "Description") -> dict[str, tuple[object, object]]:
        """Map each field or setting in which the two differ to its value here and there."""
        here, there = _flat(self), _flat(other)
        return {
            name: (here.get(name), there.get(name))
            for name in {**here, **there}
            if here.get(name) != there.get(name)
        }


def _flat(description: Description) -> dict[str, object]:
    """Lay the settings beside the fields, all as JSON would give them back."""
    fields: dict[str, object] = json.loads(msgspec.json.encode(description))
    settings = cast("dict[str, object]", fields.pop("settings"))
    return {**fields, **{f"settings[{name!r}]": value for name, value in settings.items()}}


def told(settings: Mapping[str, object]) -> str:
    """Tell the settings that make one method's answers differ; policies speak for themselves.

    >>> told({"curvature": "Zero()", "states": "kept", "chunk": 8, "exact": False})
    " with Zero(), states='kept'"
    >>> told({"chunk": 8, "exact": False})
    ''
    """
    shown = {name: value for name, value in settings.items() if name not in {"chunk", "exact"}}
    words = [
        str(value) if name in {"curvature", "slope"} else f"{name}={value!r}"
        for name, value in shown.items()
    ]
    return f" with {', '.join(words)}" if words else ""


def validate(
    description: Description,
    sample: Int[np.ndarray, "step slot"],
    ids: Int[np.ndarray, " sample"] | None = None,
) -> None:
    """Refuse a description that does not fit itself or its samples.

    Raises:
        IllFormedInfluence: With every problem, not only the first.
    """
    problems = [*_size_problems(description), *_sample_problems(description, sample, ids)]
    if problems:
        raise IllFormedInfluence(problems)


def _size_problems(about: Description) -> list[str]:
    sizes = {"steps": about.steps, "slots": about.slots, "shard": about.shard}
    problems = [f"{name} is {size}, not at least 1" for name, size in sizes.items() if size < 1]
    if not about.queries or len(set(about.queries)) < len(about.queries):
        problems.append(f"queries need names, no two alike: {about.queries}")
    observed = about.observed_at
    ascending = bool(observed) and list(observed) == sorted(set(observed))
    if not ascending or observed[0] < 0 or observed[-1] > about.steps:
        problems.append(f"observed_at must ascend within 0 ... {about.steps}: {observed}")
    return problems


def _sample_problems(
    about: Description, sample: Int[np.ndarray, "step slot"], ids: Int[np.ndarray, " sample"] | None
) -> list[str]:
    if sample.shape != about.shape[2:]:
        return [f"sample has shape {sample.shape}, steps and slots say {about.shape[2:]}"]
    if ids is not None:
        known = len(ids) == about.samples and np.isin(sample, [-1, *ids]).all()
        wanted = f"sample must be -1 (padding) or one of {about.samples} ids: {join_items(ids.tolist(), most=6)}"
        return [] if known else [wanted]
    if sample.size and not -1 <= sample.min() <= sample.max() < about.samples:
        found = f"{sample.min()} ... {sample.max()}"
        return [f"sample must lie within -1 (padding) ... {about.samples - 1}: {found}"]
    return []


def create(
    store: Path | MemoryStore,
    about: Description,
    *,
    sample: Int[np.ndarray, "step slot"],
    dtype: str,
    ids: Int[np.ndarray, " sample"] | None = None,
) -> zarr.Group:
    """Lay out an influence of zeros, with the samples of every slot."""
    group = zarr.create_group(store, zarr_format=3, attributes=_attributes(about))
    steps = min(about.shard, about.steps)
    shard = (*about.shape[:2], steps, about.slots)
    chunk = chunk_shape(shard, np.dtype(dtype).itemsize)
    _array(group, AXES, "influence", shape=about.shape, dtype=dtype, shards=shard, chunks=chunk)
    for name, kind, empty in (("sample", "int64", -1), ("loss", "float64", math.nan)):
        matrix = {"shape": sample.shape, "dtype": kind, "chunks": shard[2:], "fill_value": empty}
        _array(group, AXES[2:], name, **matrix)
    norms = {
        "shape": about.shape[:3],
        "dtype": "float64",
        "chunks": shard[:3],
        "fill_value": math.nan,
    }
    _array(group, AXES[:3], "cotangent", **norms)
    write(group, "sample", sample)
    if ids is not None:
        _array(group, ("id",), "id", shape=ids.shape, dtype="int64")
        write(group, "id", ids)
    _coordinates(group, about)
    return zarr.open_group(group.store, mode="r+")


def _coordinates(group: zarr.Group, about: Description) -> None:
    _array(group, AXES[:1], "query", shape=about.shape[:1], dtype="str")
    _array(group, AXES[1:2], "observed_at", shape=about.shape[1:2], dtype="int64")
    _array(group, AXES[2:3], "step", shape=about.shape[2:3], dtype="int64")
    write(group, "query", np.array(about.queries, dtype=object))
    write(group, "observed_at", np.array(about.observed_at))
    write(group, "step", np.arange(about.steps))
    # With a copy of all metadata in the group, xarray opens the folder without listing it and
    # meets neither the done-marks nor what a method keeps beside them. Zarr warns that other
    # readers may ignore the copy; they then read the originals.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(group.store)


def _attributes(about: Description) -> dict[str, object]:
    fields: dict[str, object] = json.loads(msgspec.json.encode(about))
    return {"format": FORMAT, "format_version": VERSION, "sign": SIGN, **fields}


def _array(group: zarr.Group, axes: tuple[str, ...], name: str, **options: Any) -> None:
    checked = (ZstdCodec(), Crc32cCodec())
    group.create_array(name, dimension_names=axes, compressors=checked, **options)


def chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cut a shard into equal chunks of at most about 1 MB, whole along its last axes.

    >>> chunk_shape((4, 10, 100, 256), 4)
    (1, 10, 100, 256)
    >>> chunk_shape((4, 10, 100, 8192), 4)
    (1, 1, 25, 8192)
    """
    room = CHUNK_BYTES // itemsize
    chunk: list[int] = []
    for extent in reversed(shard):
        chunk.insert(
            0, max(n for n in range(1, extent + 1) if extent % n == 0 and n <= max(room, 1))
        )
        room //= chunk[0]
    return tuple(chunk)


def folder(group: zarr.Group) -> Path | None:
    """Tell the folder that a group lies in; None for one in memory."""
    return group.store.root if isinstance(group.store, LocalStore) else None


def write(group: zarr.Group, name: str, values: np.ndarray, *at: slice) -> None:
    """Write into an array of the group, at some places of each axis."""
    cast("zarr.Array[Any]", group[name])[at or ...] = values


def read(group: zarr.Group, name: str, *at: slice) -> np.ndarray:
    """Read from an array of the group, at some places of each axis.

    Raises:
        DamagedInfluence: If a chunk does not agree with its checksum.
    """
    array = cast("zarr.Array[Any]", group[name])
    try:
        return np.asarray(array[at or ...])
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise DamagedInfluence(folder(group), f"{name!r} cannot be read ({error})") from error


def load(path: Path, mode: Literal["r", "r+"] = "r") -> tuple[zarr.Group, Description]:
    """Open the group in a folder, and read its description.

    Raises:
        NotAnInfluence: If there is none, or one of a later format.
        DamagedInfluence: If its metadata cannot be read.
    """
    if not (path / "zarr.json").is_file():
        raise NotAnInfluence(path, "no zarr.json there" if path.is_dir() else "no such folder")
    try:
        group = zarr.open_group(path, mode=mode, zarr_format=3)
        told = dict(group.attrs)
        if told.get("format") == FORMAT and told.get("format_version") == VERSION:
            return group, msgspec.convert(told, Description)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInfluence(path, f"zarr.json cannot be read ({error})") from error
    found = f"{told.get('format', 'unknown')} {told.get('format_version', '')}".strip()
    raise NotAnInfluence(path, f"its format is {found!r}, not '{FORMAT} {VERSION}'")


def mark_done(path: Path, shard: int) -> None:
    """Note that a shard is whole, with the sizes of its files."""
    # Zarr writes no file where all is zero, NaN or padding; that too must stay so.
    sizes = {name: _size(path / name) for name in shard_files(shard)}
    mark = path / "done" / f"{shard:06d}.json"
    mark.parent.mkdir(exist_ok=True)
    # A kill leaves either no mark or a whole one.
    scratch = mark.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(sizes), encoding="utf-8")
    scratch.replace(mark)


def done_shards(path: Path) -> frozenset[int]:
    """List the shards that are marked done."""
    return frozenset(int(mark.stem) for mark in path.glob("done/*.json"))


def shard_files(shard: int) -> list[str]:
    """Name the files that the numbers of one shard lie in, the first three rewritten on resume."""
    return [
        f"influence/c/0/0/{shard}/0",
        f"loss/c/{shard}/0",
        f"cotangent/c/0/0/{shard}",
        f"sample/c/{shard}/0",
    ]


def check_files(path: Path) -> None:
    """Look whether every file of every finished shard is as large as when it was marked.

    Raises:
        DamagedInfluence: With the names of those that are not.
    """
    damaged: list[str] = []
    for mark in sorted(path.glob("done/*.json")):
        sizes: dict[str, int | None] = json.loads(mark.read_text(encoding="utf-8"))
        damaged += [name for name, size in sizes.items() if _size(path / name) != size]
    if damaged:
        raise DamagedInfluence(path, f"missing, or of another size: {join_items(damaged)}")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
