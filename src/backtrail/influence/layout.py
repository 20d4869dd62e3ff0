"""How an influence is stored: one zarr 3 group, and a file that marks each finished shard.

    influence    [query, observed_at, step, slot]   one zarr shard per `shard` steps
    sample       [step, slot]                       row of the training set (or id), -1 is padding
    id           [id]                               all samples, where batches carry ids
    loss         [step, slot]                       training loss of each slot, NaN where unknown
    cotangent    [query, observed_at, step]         norm of the query's derivative by the state
                                                    before the step, NaN where unknown
    standard_error [query, observed_at, id]         of the totals, from methods that sample
    query, observed_at, step                        coordinates, so that xarray shows names
    done/000000.json                                sizes of the files of a finished shard

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

from backtrail.errors import (
    DamagedInfluence,
    IllFormedInfluence,
    NotAnInfluence,
    WrongFormat,
    join_items,
)

FORMAT = "backtrail influence"
VERSION = 1
SIGN = (
    "what the query gains when the sample is removed; "
    "for a loss, positive = helpful, negative = harmful"
)
AXES = ("query", "observed_at", "step", "slot")
STANDARD_ERROR = "standard_error"
# Reading one query or one state should not unpack the others; a chunk costs about a millisecond.
CHUNK_BYTES = 2**20

# The setting by which the queries of a folder are recognised, besides their names, and how far its
# sums may be apart, relative to the largest.
VALUES = "query_values"
CLOSE_VALUES = 1e-4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Everything about an influence except its arrays.

    Attributes:
        method: Name of the method, for example "DIT".
        unit: Unit of the queries, for example "nats".
        denominator: What a removal does to the divisor of its batch: "keep" or "renormalize".
        run: Identifier of the recorded run.
        queries: Name of each query; names are unique.
        observed_at: States that the queries read, ascending; state t is the one before update t.
        steps: Number of steps of the run.
        slots: Number of slots of its largest batch.
        samples: Number of rows of the training set, or of distinct ids.
        shard: Number of consecutive steps that are written, and marked done, together.
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
        """Fields and settings in which the two differ, with both values (this one's first)."""
        ours = _flatten(self)
        theirs = _flatten(other)
        found: dict[str, tuple[object, object]] = {}
        our_values = ours.pop(f"settings[{VALUES!r}]", None)
        their_values = theirs.pop(f"settings[{VALUES!r}]", None)
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                found[name] = (ours.get(name), theirs.get(name))
        if not found and not _are_close(our_values, their_values):
            found["values of the queries"] = (our_values, their_values)
        return found


def _are_close(left: object, right: object) -> bool:
    """Whether two sums of values of queries are equal up to rounding on another machine.

    Folders of earlier versions have none.
    """
    if left is None or right is None:
        return True
    ours = np.array(left, dtype=np.float64)
    theirs = np.array(right, dtype=np.float64)
    largest = max(np.abs(ours).max(), np.abs(theirs).max())
    return bool((np.abs(ours - theirs) <= CLOSE_VALUES * largest).all())


def _flatten(description: Description) -> dict[str, object]:
    """Fields and settings in one dict.

    All values are as JSON gives them back, so that a description just made equals one that was read
    from a folder.
    """
    fields: dict[str, object] = json.loads(msgspec.json.encode(description))
    settings = cast("dict[str, object]", fields.pop("settings"))
    for name, value in settings.items():
        fields[f"settings[{name!r}]"] = value
    return fields


def describe_settings(settings: Mapping[str, object]) -> str:
    """Describe the settings that distinguish results of one method, for `repr`.

    >>> describe_settings({"curvature": "Zero()", "states": "kept", "chunk": 8, "exact": False})
    " with Zero(), states='kept'"
    >>> describe_settings({"chunk": 8, "exact": False})
    ''
    """
    parts: list[str] = []
    for name, value in settings.items():
        # How many queries were computed at once changes no number, nor does the check of the
        # derivatives; `exact` and `slices` follow from the others.
        if name in {"chunk", "exact", "derivatives", "slices", VALUES}:
            continue
        # The text of a policy names its kind: Zero(), Secant(...).
        is_policy = name in {"curvature", "slope"}
        parts.append(str(value) if is_policy else f"{name}={value!r}")
    return f" with {', '.join(parts)}" if parts else ""


def validate(
    description: Description,
    sample: Int[np.ndarray, "step slot"],
    ids: Int[np.ndarray, " sample"] | None = None,
) -> None:
    """Check a description against itself and its samples.

    Raises:
        IllFormedInfluence: They do not fit; the message names every problem.
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
    is_ascending = bool(observed) and list(observed) == sorted(set(observed))
    if not is_ascending or observed[0] < 0 or observed[-1] > about.steps:
        problems.append(f"observed_at must ascend within 0 ... {about.steps}: {observed}")
    return problems


def _sample_problems(
    about: Description, sample: Int[np.ndarray, "step slot"], ids: Int[np.ndarray, " sample"] | None
) -> list[str]:
    if sample.shape != about.shape[2:]:
        return [f"sample has shape {sample.shape}, steps and slots say {about.shape[2:]}"]
    if ids is not None:
        if len(ids) == about.samples and np.isin(sample, [-1, *ids]).all():
            return []
        allowed = join_items(ids.tolist(), most=6)
        return [f"sample must be -1 (padding) or one of {about.samples} ids: {allowed}"]
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
    sampled: bool = False,
) -> zarr.Group:
    """Create an influence of zeros, with the samples of every slot.

    Args:
        store: An empty folder, or memory.
        about: Everything except the arrays.
        sample: The sample in every slot; -1 is padding.
        dtype: Precision of the influence.
        ids: All samples, ascending, where batches carry ids.
        sampled: Whether totals have standard errors; NaN until they are written.
    """
    queries, states, steps, slots = about.shape
    shard_steps = min(about.shard, steps)
    shard = (queries, states, shard_steps, slots)
    group = zarr.create_group(store, zarr_format=3, attributes=_attributes(about))
    _create_array(
        group,
        "influence",
        AXES,
        shape=about.shape,
        dtype=dtype,
        shards=shard,
        chunks=chunk_shape(shard, np.dtype(dtype).itemsize),
    )
    _create_array(
        group,
        "sample",
        AXES[2:],
        shape=sample.shape,
        dtype="int64",
        chunks=(shard_steps, slots),
        fill_value=-1,
    )
    _create_array(
        group,
        "loss",
        AXES[2:],
        shape=sample.shape,
        dtype="float64",
        chunks=(shard_steps, slots),
        fill_value=math.nan,
    )
    _create_array(
        group,
        "cotangent",
        AXES[:3],
        shape=(queries, states, steps),
        dtype="float64",
        chunks=(queries, states, shard_steps),
        fill_value=math.nan,
    )
    write(group, "sample", sample)
    if sampled:
        totals = (queries, states, about.samples)
        _create_array(
            group,
            STANDARD_ERROR,
            (*AXES[:2], "id"),
            shape=totals,
            dtype="float64",
            chunks=chunk_shape(totals, 8),
            fill_value=math.nan,
        )
    if ids is not None:
        _create_array(group, "id", ("id",), shape=ids.shape, dtype="int64")
        write(group, "id", ids)
    _create_coordinates(group, about)
    # Opened again, because the group in hand does not know the consolidated metadata yet.
    return zarr.open_group(group.store, mode="r+")


def _create_coordinates(group: zarr.Group, about: Description) -> None:
    queries, states, steps, _ = about.shape
    _create_array(group, "query", ("query",), shape=(queries,), dtype="str")
    _create_array(group, "observed_at", ("observed_at",), shape=(states,), dtype="int64")
    _create_array(group, "step", ("step",), shape=(steps,), dtype="int64")
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


def _create_array(group: zarr.Group, name: str, axes: tuple[str, ...], **options: Any) -> None:
    # The checksum comes last, so that it covers the compressed bytes.
    compressors = (ZstdCodec(), Crc32cCodec())
    group.create_array(name, dimension_names=axes, compressors=compressors, **options)


def chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cut a shard into equal chunks of at most about 1 MB, whole along its last axes.

    >>> chunk_shape((4, 10, 100, 256), 4)
    (1, 10, 100, 256)
    >>> chunk_shape((4, 10, 100, 8192), 4)
    (1, 1, 25, 8192)

    Args:
        shard: Sizes of the axes of the shard.
        itemsize: Bytes of one number.
    """
    room = CHUNK_BYTES // itemsize
    chunk: list[int] = []
    for extent in reversed(shard):
        # The largest divisor of the axis that fits into what the later axes have left.
        divisors = [n for n in range(1, extent + 1) if extent % n == 0]
        length = max(n for n in divisors if n <= max(room, 1))
        chunk.insert(0, length)
        room //= length
    return tuple(chunk)


def folder(group: zarr.Group) -> Path | None:
    """The folder of a group; None for one in memory."""
    return group.store.root if isinstance(group.store, LocalStore) else None


def write(group: zarr.Group, name: str, values: np.ndarray, *at: slice) -> None:
    """Write into an array of a group, with one slice per leading axis."""
    array = cast("zarr.Array[Any]", group[name])
    array[at or ...] = values


def read(group: zarr.Group, name: str, *at: slice) -> np.ndarray:
    """Read from an array of a group, with one slice per leading axis.

    Raises:
        DamagedInfluence: A chunk does not agree with its checksum, or cannot be read.
    """
    array = cast("zarr.Array[Any]", group[name])
    try:
        return np.asarray(array[at or ...])
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise DamagedInfluence(folder(group), f"{name!r} cannot be read ({error})") from error


def load(path: Path, mode: Literal["r", "r+"] = "r") -> tuple[zarr.Group, Description]:
    """Open the group in a folder, and read its description.

    Raises:
        NotAnInfluence: There is none, or it is something else.
        WrongFormat: Another version of backtrail wrote it, in another format.
        DamagedInfluence: Its metadata cannot be read.
    """
    if not (path / "zarr.json").is_file():
        raise NotAnInfluence(path, "no zarr.json there" if path.is_dir() else "no such folder")
    try:
        group = open_group(path, mode)
        attributes = dict(group.attrs)
        if attributes.get("format") == FORMAT and attributes.get("format_version") == VERSION:
            return group, msgspec.convert(attributes, Description)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInfluence(path, f"zarr.json cannot be read ({error})") from error
    name = attributes.get("format", "unknown")
    version = attributes.get("format_version", "")
    if name == FORMAT:
        raise WrongFormat(path, version, VERSION, remedy="compute the influence again")
    found = f"{name} {version}".strip()
    raise NotAnInfluence(path, f"its format is {found!r}, not '{FORMAT} {VERSION}'")


def open_group(path: Path, mode: Literal["r", "r+"]) -> zarr.Group:
    """Open a group all of whose arrays have zarr format 3.

    An array of format 2 may name pickle as its codec, so reading it could run code. The arrays of a
    group of format 3 are looked up in format 3, but its consolidated copy of their metadata may
    hold anything.

    Raises:
        ValueError: An array has another format, or the metadata cannot be read.
    """
    group = zarr.open_group(path, mode=mode, zarr_format=3)
    consolidated = group.metadata.consolidated_metadata
    if consolidated is not None:
        for name, metadata in consolidated.flattened_metadata.items():
            if metadata.zarr_format != 3:
                raise ValueError(f"{name!r} has zarr format {metadata.zarr_format}, not 3")
    return group


def mark_done(path: Path, shard: int) -> None:
    """Mark a shard as finished, with the sizes of its files."""
    # Zarr writes no file where all is zero, NaN or padding. The mark notes its absence as well, so
    # that a file which appears later counts as damage.
    sizes = {name: _size(path / name) for name in shard_files(shard)}
    mark = path / "done" / f"{shard:06d}.json"
    mark.parent.mkdir(exist_ok=True)
    # Renamed when it is complete: a kill leaves either no mark or a complete one.
    scratch = mark.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(sizes), encoding="utf-8")
    scratch.replace(mark)


def done_shards(path: Path) -> frozenset[int]:
    """Numbers of the shards that are marked as finished."""
    return frozenset(int(mark.stem) for mark in path.glob("done/*.json"))


def shard_files(shard: int) -> list[str]:
    """Names of the files of one shard; resuming rewrites the first three."""
    return [
        f"influence/c/0/0/{shard}/0",
        f"loss/c/{shard}/0",
        f"cotangent/c/0/0/{shard}",
        f"sample/c/{shard}/0",
    ]


def check_files(path: Path) -> None:
    """Check that every file of every finished shard is as large as when it was marked.

    Raises:
        DamagedInfluence: Some are not; the message names them.
    """
    damaged: list[str] = []
    for mark in sorted(path.glob("done/*.json")):
        sizes: dict[str, int | None] = json.loads(mark.read_text(encoding="utf-8"))
        damaged += [name for name, size in sizes.items() if _size(path / name) != size]
    if damaged:
        raise DamagedInfluence(path, f"missing, or of another size: {join_items(damaged)}")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
