"""Writes an influence shard by shard, so that an attribution that was killed can resume."""

import shutil
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import zarr
from jaxtyping import Float, Float64, Int
from zarr.storage import MemoryStore

from backtrail.errors import (
    DifferentInfluence,
    FolderTaken,
    IllFormedInfluence,
    NonFiniteInfluence,
    UnfinishedInfluence,
)
from backtrail.influence import layout
from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.reader import InfluenceReader


@final
class InfluenceWriter:
    """Writes an influence; methods use it.

    Write the shards of steps in any order, and mark each done once everything that belongs to it is
    on disk. Then call `finish`. Without a path the influence is held in memory.

    >>> about = Description(
    ...     method="none",
    ...     unit="nats",
    ...     denominator="keep",
    ...     run="a run",
    ...     queries=("loss",),
    ...     observed_at=(3,),
    ...     steps=3,
    ...     slots=2,
    ...     samples=4,
    ...     shard=2,
    ... )
    >>> sample = np.array([[0, 1], [2, 3], [0, -1]])
    >>> writer = InfluenceWriter.create(None, about, sample=sample, dtype="float64")
    >>> for shard, (start, stop) in enumerate(writer.shards):
    ...     size = stop - start
    ...     writer.write(start, np.ones((1, 1, size, 2)), np.zeros((size, 2)))
    ...     writer.mark_done(shard)
    >>> writer.finish().total().tolist()
    [[[2.0, 1.0, 1.0, 1.0]]]
    """

    def __init__(self, group: zarr.Group, description: Description) -> None:
        self._group = group
        self.description = description
        self.path = layout.folder(group)
        self._marked_in_memory: set[int] = set()
        self.allow_non_finite = False

    @classmethod
    def create(
        cls,
        path: Path | None,
        description: Description,
        *,
        sample: Int[np.ndarray, "step slot"],
        dtype: str,
        ids: Int[np.ndarray, " sample"] | None = None,
        sampled: bool = False,
    ) -> "InfluenceWriter":
        """Create an influence of zeros.

        Args:
            path: A new or empty folder; None keeps the influence in memory.
            description: Everything except the arrays.
            sample: Row of the training set in every slot; -1 pads a short batch.
            dtype: "float32" or "float64".
            ids: All samples, ascending, where batches carry ids.
            sampled: Whether the method samples, and its totals have standard errors.

        Raises:
            FolderTaken: The folder is not empty, or is a file.
            IllFormedInfluence: Description and samples do not fit together.
        """
        layout.validate(description, sample, ids)
        arrays: dict[str, Any] = {"sample": sample, "dtype": dtype, "ids": ids, "sampled": sampled}
        if path is None:
            return cls(layout.create(MemoryStore(), description, **arrays), description)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FolderTaken(path)
        # Created in a scratch folder and then renamed: a kill leaves no incomplete influence.
        scratch = path.with_name(f".{path.name}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        layout.create(scratch, description, **arrays)
        scratch.replace(path)
        group, _ = layout.load(path, "r+")
        return cls(group, description)

    @classmethod
    def resume(cls, path: Path, description: Description) -> "InfluenceWriter":
        """Resume an influence that was started with the same description.

        Args:
            path: Its folder.
            description: Everything except the arrays.

        Raises:
            DifferentInfluence: The folder holds another influence; the message names what differs.
        """
        group, stored = layout.load(path, "r+")
        differences = stored.differences(description)
        if differences:
            raise DifferentInfluence(path, differences)
        return cls(group, description)

    @classmethod
    def begin(
        cls,
        path: Path | None,
        description: Description,
        *,
        sample: Int[np.ndarray, "step slot"],
        dtype: str,
        ids: Int[np.ndarray, " sample"] | None = None,
        sampled: bool = False,
    ) -> "InfluenceWriter":
        """Resume the influence in a folder, or create it where there is none.

        Takes the arguments of `create`.
        """
        if path is not None and (path / "zarr.json").is_file():
            return cls.resume(path, description)
        return cls.create(path, description, sample=sample, dtype=dtype, ids=ids, sampled=sampled)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First step, and the one after the last, of each shard."""
        return self.description.shards

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the shards that are marked done, by any process."""
        if self.path is None:
            return frozenset(self._marked_in_memory)
        return layout.done_shards(self.path)

    def write(
        self,
        start: int,
        block: Float[np.ndarray, "query observed_at step slot"],
        loss: Float[np.ndarray, "step slot"],
        *,
        cotangent: Float[np.ndarray, "query observed_at step"] | None = None,
    ) -> None:
        """Write one shard, replacing what an earlier attempt may have left of it.

        Args:
            start: First step of the shard.
            block: Influence at its steps.
            loss: Training loss of each slot, NaN where unknown.
            cotangent: Norm of each query's derivative by the state before each step, where the
                method computes it.

        Raises:
            IllFormedInfluence: The arrays do not make up exactly one shard.
            NonFiniteInfluence: Some influence is NaN or infinite, also where that is because the
                result is stored in float32.
        """
        about = self.description
        shard, offset = divmod(start, about.shard)
        size = min(about.shard, about.steps - start)
        expected = (*about.shape[:2], size, about.slots)
        if offset or size < 1 or block.shape != expected or loss.shape != expected[2:]:
            raise IllFormedInfluence(
                [
                    f"a block must be one whole shard: {about.shape} in steps of {about.shard}, "
                    f"not {block.shape} with losses {loss.shape} from step {start}"
                ]
            )
        self._check_finite(start, block)
        self._delete_earlier_attempt(shard)
        steps = slice(start, start + size)
        layout.write(self._group, "influence", block, slice(None), slice(None), steps)
        layout.write(self._group, "loss", loss, steps)
        if cotangent is not None:
            layout.write(self._group, "cotangent", cotangent, slice(None), slice(None), steps)

    def write_standard_errors(
        self, values: Float64[np.ndarray, "query observed_at sample"]
    ) -> None:
        """Write the standard errors of the totals, of an influence that was created with them.

        Args:
            values: The standard errors, NaN where unknown.
        """
        if self.path is not None:
            # What an earlier attempt may have left incomplete would fail its checksum.
            shutil.rmtree(self.path / layout.STANDARD_ERROR / "c", ignore_errors=True)
        layout.write(self._group, layout.STANDARD_ERROR, values)

    def _check_finite(self, start: int, block: Float[np.ndarray, "query state step slot"]) -> None:
        """Refuse what is no number: it would be summed and ranked like one.

        Raises:
            NonFiniteInfluence: Some influence is NaN or infinite.
        """
        stored = cast("zarr.Array[Any]", self._group["influence"]).dtype
        with np.errstate(over="ignore"):
            as_stored = block.astype(stored)
        # Methods sweep backwards, so that the last step is where it began. The axis of steps comes
        # first, so that the last entry belongs to that step.
        bad = np.argwhere(~np.isfinite(np.moveaxis(as_stored, 2, 0)))
        if self.allow_non_finite or not len(bad):
            return
        step, query, state, slot = bad[-1]
        about = self.description
        sample = layout.read(self._group, "sample", slice(start + step, start + step + 1))[0]
        raise NonFiniteInfluence(
            about.method,
            about.queries[query],
            about.observed_at[state],
            step=start + int(step),
            sample=int(sample[slot]),
        )

    def _delete_earlier_attempt(self, shard: int) -> None:
        if self.path is None:
            return
        # Zarr reads the old file before it writes the new one, and an incomplete file fails its
        # checksum. The file of `sample`, the last of the list, is written when the influence is
        # created.
        for name in layout.shard_files(shard)[:3]:
            (self.path / name).unlink(missing_ok=True)

    def mark_done(self, shard: int) -> None:
        """Mark a shard as finished.

        Call it last: when the shard is written, and everything that is needed to resume after it.
        """
        if self.path is None:
            self._marked_in_memory.add(shard)
        else:
            layout.mark_done(self.path, shard)

    def finish(self) -> Influence:
        """Return the finished influence.

        Raises:
            UnfinishedInfluence: A shard is not marked done.
        """
        if len(self.done) < len(self.shards):
            raise UnfinishedInfluence(self.path, len(self.done), len(self.shards))
        return Influence(InfluenceReader(self._group, self.description))


def from_arrays(
    description: Description,
    values: Float[np.ndarray, "query observed_at step slot"],
    *,
    sample: Int[np.ndarray, "step slot"],
    loss: Float[np.ndarray, "step slot"] | None = None,
    path: Path | None = None,
) -> Influence:
    """Make an influence from complete arrays.

    Args:
        description: Everything except the arrays.
        values: The influence.
        sample: Row of the training set in every slot; -1 is padding.
        loss: Training loss of each slot; None where unknown.
        path: A new or empty folder; None keeps the influence in memory.
    """
    losses = np.full(sample.shape, np.nan) if loss is None else loss
    writer = InfluenceWriter.create(path, description, sample=sample, dtype=str(values.dtype))
    # What readers make of numbers that no method writes any more is tested with such arrays.
    writer.allow_non_finite = True
    for shard, (start, stop) in enumerate(writer.shards):
        writer.write(start, values[:, :, start:stop], losses[start:stop])
        writer.mark_done(shard)
    return writer.finish()


def example() -> Influence:
    """Tiny influence for examples: 2 queries, 2 states, 4 steps, 2 slots, 4 samples.

    Sample 0 is visited at the steps 0, 1 and 3, sample 3 never.

    >>> example().sample.tolist()
    [[0, 1], [2, 0], [1, 2], [0, -1]]
    >>> example().total()[0, 1].tolist()
    [3.0, 2.0, -1.0, 0.0]
    """
    sample = np.array([[0, 1], [2, 0], [1, 2], [0, -1]])
    by_visit = np.array([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, 0.0]])  # [step, slot]
    # Zero at the steps from the observed state on, and twice as large at state 2 as at state 4.
    is_before_state = np.arange(4)[:, None] < np.array([2, 4])[:, None, None]
    by_state = np.where(is_before_state, by_visit, 0.0) * np.array([2.0, 1.0])[:, None, None]
    values = np.array([1.0, 10.0])[:, None, None, None] * by_state
    about = Description(
        method="example",
        unit="nats",
        denominator="keep",
        run="example",
        queries=("test loss", "ten test losses"),
        observed_at=(2, 4),
        steps=4,
        slots=2,
        samples=4,
        shard=2,
    )
    return from_arrays(about, values, sample=sample, loss=np.abs(by_visit))
