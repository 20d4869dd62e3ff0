"""How embeddings lie on disk: one zarr 3 group, and a mark once all of it is there.

    embedding  [step, slot, coordinate]   towards the next state that is observed
    sample     [step, slot]               row of the training set (or id), -1 pads a short batch
    loss       [step, slot]               training loss of each slot
    transport/BLOCK  [stretch, coordinate, coordinate]   what a change at the start of a stretch becomes at its end
    captured/  a group of its own, until the recursion is done: what the pass over the training found, and its marks
    done.json  the files and their sizes, written last

In memory it is the same groups without the marks.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, final

import msgspec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from backtrail.errors import (
    DamagedEmbeddings,
    DifferentEmbeddings,
    FolderTaken,
    NotEmbeddings,
    UnfinishedEmbeddings,
    join_items,
)
from backtrail.influence.layout import chunk_shape, folder
from backtrail.run.files import replacing

FORMAT, VERSION = "backtrail embeddings", 1
AXES = ("step", "slot", "coordinate")
SHARD_BYTES = 64 * 2**20  # of a few arrays of this size that are in memory at once
SHARDS, SHORTEST = (
    20,
    8,
)  # a pass over the training can go on at this many points, at least so many steps apart


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Everything about embeddings but the numbers.

    Attributes:
        run: identity of the recorded run.
        steps: how many it has.
        slots: how many places its largest batch has.
        samples: how many rows the training set has, or how many ids were seen.
        observed_at: the states that embeddings were made for, ascending; each ends a stretch of
            steps.
        layout: coordinates of every parameter, [start, stop).
        blocks: coordinates of every block of the recursion, likewise.
        dtype: "float32" or "float64".
        settings: of the method.
    """

    run: str
    steps: int
    slots: int
    samples: int
    observed_at: tuple[int, ...]
    layout: Mapping[str, tuple[int, int]]
    blocks: Mapping[str, tuple[int, int]]
    dtype: str
    settings: Mapping[str, object]

    @property
    def rank(self) -> int:
        """How many coordinates a sample has in all."""
        return max(stop for _, stop in self.layout.values())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of [step, slot, coordinate]."""
        return self.steps, self.slots, self.rank

    @property
    def shard(self) -> int:
        """How many steps are read and written together."""
        fitting = SHARD_BYTES // (self.slots * self.rank * np.dtype(self.dtype).itemsize)
        return max(1, min(max(SHORTEST, -(-self.steps // SHARDS)), self.steps, fitting))

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First step, and the one after the last, of each shard."""
        starts = range(0, self.steps, self.shard)
        return [(start, min(start + self.shard, self.steps)) for start in starts]

    def differences(self, other: "About") -> dict[str, tuple[object, object]]:
        """Map each field or setting in which the two differ to its value here and there."""
        here, there = (json.loads(msgspec.json.encode(about)) for about in (self, other))
        here, there = ({**about, **about.pop("settings")} for about in (here, there))
        return {
            name: (here.get(name), there.get(name))
            for name in {**here, **there}
            if here.get(name) != there.get(name)
        }


@final
class EmbeddingStore:
    """The arrays of embeddings, by step."""

    def __init__(self, group: zarr.Group, about: About, captured: zarr.Group | None = None) -> None:
        self.group, self.captured, self.about = group, captured, about
        self.path = folder(group)
        self._done: set[int] = set()

    @classmethod
    def begin(
        cls,
        path: Path | None,
        about: About,
        captured: Mapping[str, tuple[int, ...]],
        *,
        sample: np.ndarray,
    ) -> "EmbeddingStore":
        """Go on with embeddings that were begun with the same description, or begin new ones.

        Args:
            path: a folder; None keeps all in memory.
            about: everything but the numbers.
            captured: shapes of the arrays that the pass over the training fills, by step.
            sample: row of the training set in every slot; -1 pads a short batch.

        Raises:
            DifferentEmbeddings: what is there was begun with other arguments.
            FolderTaken: something else is there.
        """
        if path is None:
            return cls(
                _create(MemoryStore(), about, sample),
                about,
                _create_captured(MemoryStore(), about, captured),
            )
        if not (path / "zarr.json").is_file():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise FolderTaken(path)
            _lay_out(path, about, captured, sample=sample)
        group, there = _load(path, "r+")
        if differences := there.differences(about):
            raise DifferentEmbeddings(path, differences)
        ongoing = not (path / "done.json").is_file()
        return cls(group, about, zarr.open_group(path / "captured", mode="r+") if ongoing else None)

    @classmethod
    def open(cls, path: Path) -> "EmbeddingStore":
        """Open finished embeddings.

        Raises:
            UnfinishedEmbeddings: the embedding was interrupted.
            DamagedEmbeddings: a file is missing, or of another size.
        """
        group, about = _load(path, "r")
        store = cls(group, about)
        if not store.finished:
            raise UnfinishedEmbeddings(path)
        sizes: dict[str, int] = json.loads((path / "done.json").read_text(encoding="utf-8"))
        if sizes != (found := _sizes(path)):
            damaged = [name for name in {**sizes, **found} if sizes.get(name) != found.get(name)]
            raise DamagedEmbeddings(
                path, f"missing, or of another size: {join_items(sorted(damaged), most=6)}"
            )
        return store

    @property
    def finished(self) -> bool:
        """Whether all is there."""
        return (self.path / "done.json").is_file() if self.path else self.captured is None

    @property
    def missing(self) -> list[int]:
        """Shards of the pass over the training that are not done, in order."""
        marks = (
            {int(mark.stem) for mark in (self.path / "captured" / "done").glob("*")}
            if self.path
            else self._done
        )
        return [shard for shard in range(len(self.about.shards)) if shard not in marks]

    @property
    def captured_names(self) -> list[str]:
        """The arrays that the pass over the training filled."""
        assert self.captured is not None
        return list(self.captured.attrs["arrays"])  # type: ignore[arg-type]

    def mark_captured(self, shard: int) -> None:
        """Note that a shard of the pass over the training is whole."""
        self._done.add(shard)
        if self.path:
            with replacing(self.path / "captured" / "done" / f"{shard:06d}") as scratch:
                scratch.touch()

    def finish(self) -> None:
        """Note that all is there, and drop what only the recursion needed."""
        self.captured = None
        if self.path:
            with replacing(self.path / "done.json") as scratch:
                scratch.write_text(json.dumps(_sizes(self.path)), encoding="utf-8")
            shutil.rmtree(self.path / "captured", ignore_errors=True)

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        """Write into an array, from one place of its first axis on."""
        group = self.captured if name.startswith("captured/") else self.group
        assert group is not None
        array = cast("zarr.Array[Any]", group[name.removeprefix("captured/")])
        array[start : start + len(values)] = values

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read from an array, between two places of its first axis.

        Raises:
            DamagedEmbeddings: a chunk does not agree with its checksum.
        """
        group = self.captured if name.startswith("captured/") else self.group
        assert group is not None
        array = cast("zarr.Array[Any]", group[name.removeprefix("captured/")])
        try:
            return np.asarray(array[start:stop])
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise DamagedEmbeddings(self.path, f"{name!r} cannot be read ({error})") from error


def _lay_out(
    path: Path, about: About, captured: Mapping[str, tuple[int, ...]], *, sample: np.ndarray
) -> None:
    """Make the folder beside its place and move it there whole: a kill leaves nothing half-made.

    Where another process has done so meanwhile, its folder stays.

    Raises:
        OSError: it cannot be moved there for another reason.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    _create(scratch, about, sample)
    _create_captured(scratch / "captured", about, captured)
    try:
        scratch.replace(path)
    except OSError:
        if not (path / "zarr.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _create(store: Path | MemoryStore, about: About, sample: np.ndarray) -> zarr.Group:
    told = {"format": FORMAT, "format_version": VERSION, **json.loads(msgspec.json.encode(about))}
    group = zarr.create_group(store, zarr_format=3, attributes=told)
    _array(group, "embedding", about.shape, shard=about.shard, dtype=about.dtype, axes=AXES)
    for name, kind in (("sample", "int64"), ("loss", "float64")):
        _array(group, name, about.shape[:2], shard=about.shard, dtype=kind, axes=AXES[:2])
    cast("zarr.Array[Any]", group["sample"])[...] = sample
    if len(about.observed_at) > 1:
        for place, (start, stop) in enumerate(about.blocks.values()):
            shape = (len(about.observed_at), stop - start, stop - start)
            _array(
                group,
                f"transport/{place}",
                shape,
                shard=1,
                dtype=about.dtype,
                axes=("stretch", "end", "start"),
            )
    with warnings.catch_warnings():  # that other readers may ignore the copy of the metadata
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(group.store)
    return zarr.open_group(group.store, mode="r+")


def _create_captured(
    store: Path | MemoryStore, about: About, shapes: Mapping[str, tuple[int, ...]]
) -> zarr.Group:
    group = zarr.create_group(store, zarr_format=3, attributes={"arrays": list(shapes)})
    for name, shape in shapes.items():
        _array(group, name, (about.steps, *shape), shard=about.shard, dtype=about.dtype)
    return group


def _array(
    group: zarr.Group,
    name: str,
    shape: Sequence[int],
    *,
    shard: int,
    dtype: str,
    axes: tuple[str, ...] | None = None,
) -> None:
    """An array of the group, as it is: random numbers hardly shrink. One without names of its axes does not last."""
    whole = (min(shard, shape[0]), *shape[1:])
    group.create_array(
        name,
        shape=tuple(shape),
        dtype=dtype,
        shards=whole if axes else None,
        chunks=chunk_shape(whole, np.dtype(dtype).itemsize) if axes else whole,
        dimension_names=axes,
        compressors=(Crc32cCodec(),),
    )


def _load(path: Path, mode: Literal["r", "r+"]) -> tuple[zarr.Group, About]:
    if not (path / "zarr.json").is_file():
        raise NotEmbeddings(path, "no zarr.json there" if path.is_dir() else "no such folder")
    try:
        group = zarr.open_group(path, mode=mode, zarr_format=3)
        told = dict(group.attrs)
        if told.get("format") == FORMAT and told.get("format_version") == VERSION:
            return group, msgspec.convert(told, About)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedEmbeddings(path, f"zarr.json cannot be read ({error})") from error
    found = f"{told.get('format', 'unknown')} {told.get('format_version', '')}".strip()
    raise NotEmbeddings(path, f"its format is {found!r}, not '{FORMAT} {VERSION}'")


def _sizes(path: Path) -> dict[str, int]:
    """Sizes of the files of a finished embedding."""
    files = (
        file
        for file in path.rglob("*")
        if file.is_file() and "captured" not in file.relative_to(path).parts
    )
    return {
        str(file.relative_to(path)): file.stat().st_size
        for file in files
        if "done" not in file.name
    }
