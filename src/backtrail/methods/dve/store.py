"""How embeddings lie on disk: one zarr 3 group, and a mark once all of it is there.

    embedding        [step, slot, coordinate]           towards the next observed state
    sample           [step, slot]                       row of the training set (or id), -1: padding
    loss             [step, slot]                       training loss of each slot
    transport/BLOCK  [stretch, coordinate, coordinate]  what a change at the start of a stretch
                                                        becomes at its end
    captured/        a group of its own until the recursion is done: what the pass over the
                     training found, with its marks
    done.json        the files and their sizes, written last

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
    WrongFormat,
    join_items,
)
from backtrail.influence.layout import chunk_shape, folder, open_group
from backtrail.run.files import replacing

FORMAT = "backtrail embeddings"
VERSION = 1
AXES = ("step", "slot", "coordinate")
# Several arrays of this size are in memory at once.
SHARD_BYTES = 64 * 2**20
# A pass over the training can resume at about SHARDS points, at least SHORTEST_SHARD steps apart.
SHARDS = 20
SHORTEST_SHARD = 8


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Everything about embeddings but the numbers.

    Attributes:
        run: Identifier of the recorded run.
        steps: How many steps it has.
        slots: How many places its largest batch has.
        samples: How many rows the training set has, or how many ids were seen.
        observed_at: The states that embeddings were made for, ascending; each ends a stretch.
        layout: Coordinates [start, stop) of every parameter.
        blocks: Coordinates [start, stop) of every block of the recursion.
        dtype: "float32" or "float64".
        settings: Arguments of the method.
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
        step_bytes = self.slots * self.rank * np.dtype(self.dtype).itemsize
        fitting = SHARD_BYTES // step_bytes
        wanted = max(SHORTEST_SHARD, -(-self.steps // SHARDS))
        return max(1, min(wanted, self.steps, fitting))

    @property
    def shards(self) -> list[tuple[int, int]]:
        """Steps [first, stop) of each shard."""
        starts = range(0, self.steps, self.shard)
        return [(start, min(start + self.shard, self.steps)) for start in starts]

    def differences(self, other: "About") -> dict[str, tuple[object, object]]:
        """Map each field or setting in which the two differ to its values here and there."""
        here = self._flat()
        there = other._flat()
        return {
            name: (here.get(name), there.get(name))
            for name in {**here, **there}
            if here.get(name) != there.get(name)
        }

    def _flat(self) -> dict[str, object]:
        # As JSON has it, since one of the two was read from a file: tuples are lists there.
        fields: dict[str, Any] = json.loads(msgspec.json.encode(self))
        settings: dict[str, object] = fields.pop("settings")
        return fields | settings


@final
class EmbeddingStore:
    """The arrays of embeddings, by step."""

    def __init__(self, group: zarr.Group, about: About, captured: zarr.Group | None = None) -> None:
        self.group = group
        self.captured = captured
        self.about = about
        self.path = folder(group)
        # Marks of shards, for a store in memory.
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
        """Resume embeddings that were begun with the same description, or begin new ones.

        Args:
            path: A folder; None keeps everything in memory.
            about: Everything but the numbers.
            captured: Shapes, for one step, of the arrays that the pass over the training fills.
            sample: Row of the training set in every slot; -1 pads a short batch.

        Raises:
            DifferentEmbeddings: Those in the folder were begun with other arguments.
            FolderTaken: Something else is in the folder.
        """
        if path is None:
            group = _create(MemoryStore(), about, sample)
            return cls(group, about, _create_captured(MemoryStore(), about, captured))
        if not (path / "zarr.json").is_file():
            is_empty = path.is_dir() and not any(path.iterdir())
            if path.exists() and not is_empty:
                raise FolderTaken(path)
            _lay_out(path, about, captured, sample=sample)
        group, there = _load(path, "r+")
        differences = there.differences(about)
        if differences:
            raise DifferentEmbeddings(path, differences)
        if (path / "done.json").is_file():
            return cls(group, about)
        return cls(group, about, open_group(path / "captured", mode="r+"))

    @classmethod
    def open(cls, path: Path) -> "EmbeddingStore":
        """Open finished embeddings.

        Raises:
            UnfinishedEmbeddings: The embedding was interrupted.
            DamagedEmbeddings: A file is missing, or of another size.
        """
        group, about = _load(path, "r")
        store = cls(group, about)
        if not store.finished:
            raise UnfinishedEmbeddings(path)
        expected: dict[str, int] = json.loads((path / "done.json").read_text(encoding="utf-8"))
        found = _sizes(path)
        damaged = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if damaged:
            names = join_items(sorted(damaged), most=6)
            raise DamagedEmbeddings(path, f"missing, or of another size: {names}")
        return store

    @property
    def finished(self) -> bool:
        """Whether all is there."""
        if self.path is None:
            return self.captured is None
        return (self.path / "done.json").is_file()

    @property
    def missing(self) -> list[int]:
        """Shards of the pass over the training that are not done, ascending."""
        if self.path is None:
            done = self._done
        else:
            done = {int(mark.stem) for mark in (self.path / "captured" / "done").glob("*")}
        return [shard for shard in range(len(self.about.shards)) if shard not in done]

    @property
    def captured_names(self) -> list[str]:
        """The arrays that the pass over the training filled."""
        assert self.captured is not None
        return list(self.captured.attrs["arrays"])  # type: ignore[arg-type]

    def mark_captured(self, shard: int) -> None:
        """Note that a shard of the pass over the training is whole."""
        self._done.add(shard)
        if self.path is not None:
            with replacing(self.path / "captured" / "done" / f"{shard:06d}") as scratch:
                scratch.touch()

    def finish(self) -> None:
        """Note that all is there, and delete what only the recursion needed."""
        self.captured = None
        if self.path is None:
            return
        # The mark comes first: a kill in between leaves finished embeddings and some waste.
        with replacing(self.path / "done.json") as scratch:
            scratch.write_text(json.dumps(_sizes(self.path)), encoding="utf-8")
        shutil.rmtree(self.path / "captured", ignore_errors=True)

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        """Write into an array, from one place of its first axis on."""
        self._array(name)[start : start + len(values)] = values

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read from an array, between two places of its first axis.

        Raises:
            DamagedEmbeddings: A chunk does not agree with its checksum.
        """
        array = self._array(name)
        try:
            return np.asarray(array[start:stop])
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise DamagedEmbeddings(self.path, f"{name!r} cannot be read ({error})") from error

    def _array(self, name: str) -> "zarr.Array[Any]":
        group = self.captured if name.startswith("captured/") else self.group
        assert group is not None
        return cast("zarr.Array[Any]", group[name.removeprefix("captured/")])


def _lay_out(
    path: Path, about: About, captured: Mapping[str, tuple[int, ...]], *, sample: np.ndarray
) -> None:
    """Make the folder beside its place and move it there whole, so that a kill leaves no half.

    Where another process made it meanwhile, that one stays.

    Raises:
        OSError: It cannot be moved there for another reason.
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
    fields = json.loads(msgspec.json.encode(about))
    attributes = {"format": FORMAT, "format_version": VERSION, **fields}
    group = zarr.create_group(store, zarr_format=3, attributes=attributes)
    _create_array(group, "embedding", about.shape, shard=about.shard, dtype=about.dtype, axes=AXES)
    by_slot = about.shape[:2]
    _create_array(group, "sample", by_slot, shard=about.shard, dtype="int64", axes=AXES[:2])
    _create_array(group, "loss", by_slot, shard=about.shard, dtype="float64", axes=AXES[:2])
    cast("zarr.Array[Any]", group["sample"])[...] = sample
    if len(about.observed_at) > 1:
        # With a single stretch nothing has to be carried over the stretches behind it.
        for place, (start, stop) in enumerate(about.blocks.values()):
            rank = stop - start
            _create_array(
                group,
                f"transport/{place}",
                (len(about.observed_at), rank, rank),
                shard=1,
                dtype=about.dtype,
                axes=("stretch", "end", "start"),
            )
    with warnings.catch_warnings():
        # zarr warns that other readers may ignore the consolidated copy of the metadata.
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(group.store)
    return zarr.open_group(group.store, mode="r+")


def _create_captured(
    store: Path | MemoryStore, about: About, shapes: Mapping[str, tuple[int, ...]]
) -> zarr.Group:
    group = zarr.create_group(store, zarr_format=3, attributes={"arrays": list(shapes)})
    for name, shape in shapes.items():
        whole = (about.steps, *shape)
        _create_array(group, name, whole, shard=about.shard, dtype=about.dtype, axes=None)
    return group


def _create_array(
    group: zarr.Group,
    name: str,
    shape: Sequence[int],
    *,
    shard: int,
    dtype: str,
    axes: tuple[str, ...] | None,
) -> None:
    """Create an array, uncompressed since random numbers hardly shrink, with checksums.

    Arrays without names of axes are deleted after the recursion: they have one chunk a shard.
    """
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
        group = open_group(path, mode)
        attributes = dict(group.attrs)
        is_ours = attributes.get("format") == FORMAT
        if is_ours and attributes.get("format_version") == VERSION:
            return group, msgspec.convert(attributes, About)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedEmbeddings(path, f"zarr.json cannot be read ({error})") from error
    version = attributes.get("format_version", "")
    if is_ours:
        raise WrongFormat(path, version, VERSION, remedy="compute the embeddings again")
    found = f"{attributes.get('format', 'unknown')} {version}".strip()
    raise NotEmbeddings(path, f"its format is {found!r}, not '{FORMAT} {VERSION}'")


def _sizes(path: Path) -> dict[str, int]:
    """Sizes of the files of finished embeddings, by name."""
    sizes = {}
    for file in path.rglob("*"):
        name = file.relative_to(path)
        is_scratch = "captured" in name.parts or "done" in file.name
        if file.is_file() and not is_scratch:
            sizes[str(name)] = file.stat().st_size
    return sizes
