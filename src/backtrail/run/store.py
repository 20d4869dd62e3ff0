"""The files of a run folder: `Store` reads them, `Writer` writes them.

manifest.json                     written after every file that it names
states/00000050.safetensors       state 50
steps/00000000.parquet            the step log from step 0 on
steps/00001000.journal            the steps since, one line each, appended as they are made
batches/00000012.safetensors      the batches of step 12, where they cannot be read again
rows/00000000.safetensors         what live capture wrote of the steps from 0 on
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import final

import msgspec
import polars as pl

from backtrail.errors import DamagedFile
from backtrail.run import journal
from backtrail.run.background import BackgroundThread
from backtrail.run.files import checksum, read_checked, replacing
from backtrail.run.manifest import Manifest, write_manifest
from backtrail.run.tensors import digest, pack_batches, pack_state, unpack_batches, unpack_state
from backtrail.step.state import BatchRecord, State, Step
from backtrail.task.task import Batch

SEGMENT = 1000  # steps after which a journal becomes a Parquet file
MAX_IN_BACKGROUND = 2**28  # bytes; a training waits for a larger file instead of keeping it


@final
@dataclass(frozen=True, slots=True)
class Store:
    """Reads the files of a run folder."""

    folder: Path
    manifest: Manifest

    def states(self) -> list[int]:
        """Numbers of the states on disk, ascending."""
        names = [name for name in self.manifest.files if name.startswith("states/")]
        return sorted(int(Path(name).stem) for name in names)

    def state(self, number: int) -> State:
        """Read one state.

        Raises:
            DamagedFile: the file is missing or changed.
        """
        name = state_file(number)
        content = read_checked(self.folder, name, self.manifest.files[name])
        return unpack_state(content)

    def batches(self, step: int, fed: Sequence[BatchRecord]) -> tuple[Batch, ...]:
        """Read the stored batches of a step; None stands where a batch was not stored.

        Args:
            step: number of the step.
            fed: the step's entries in the log.

        Raises:
            DamagedFile: the file is missing, unreadable or changed.
        """
        path = self.folder / batches_file(step)
        try:
            batches = unpack_batches(path.read_bytes())
        except Exception as error:
            raise DamagedFile(path, str(error)) from error
        # The manifest does not name these files. The digests in the log are their checksums.
        for place, (record, batch) in enumerate(zip(fed, batches, strict=True)):
            if not record.stored:
                continue
            found = digest(batch)
            if found != record.digest:
                raise DamagedFile(
                    path, f"its batch {place} has checksum {found}, and had {record.digest}"
                )
        return batches

    def log(self) -> Iterator[Step]:
        """Read all completed steps, in order.

        Raises:
            DamagedFile: a segment is missing or changed, a line of the journal does not parse, or
                the journal has a gap.
        """
        count = 0
        segments = sorted(name for name in self.manifest.files if name.startswith("steps/"))
        for name in segments:
            content = read_checked(self.folder, name, self.manifest.files[name])
            steps = journal.from_table(pl.read_parquet(BytesIO(content)))
            count += len(steps)
            yield from steps
        # A journal is named after its first step. One that a killed process had sealed and not
        # deleted yet has a smaller number than the steps read so far, and is skipped. One that it
        # had not sealed yet may be followed by another.
        while True:
            steps = self._read_journal(count)
            if not steps:
                return
            count += len(steps)
            yield from steps

    def _read_journal(self, first: int) -> list[Step]:
        """Read the journal whose first step is `first`; empty if there is none.

        Raises:
            DamagedFile: a line does not parse, or a step is missing.
        """
        path = self.folder / journal_file(first)
        if not path.is_file():
            return []
        try:
            steps = journal.read(path)
        except msgspec.DecodeError as error:
            raise DamagedFile(path, f"a line does not parse ({error})") from error
        for expected, step in enumerate(steps, first):
            if step.index != expected:
                raise DamagedFile(path, f"it has step {step.index} in place of step {expected}")
        return steps


@final
class Writer:
    """Writes the files of a run folder, each atomically, and the manifest after them.

    States and segments are written by a background thread, one at a time and in order. A training
    waits for the one before, so at most one is held in memory. An error of the thread is raised by
    the next write, or at the end.

    Raises:
        OSError: from any method; a file could not be written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        # Only the background thread touches the manifest while it has work.
        self.manifest = manifest
        self._thread = BackgroundThread()
        self._journal: list[Step] = []  # steps since the last segment
        self._journal_start = 0  # number of the first of them
        write_manifest(folder, manifest)
        (folder / "steps").mkdir(exist_ok=True)

    def keep_state(self, number: int, state: State) -> None:
        """Store a state.

        Its tensors may be those of the live model: they are copied before this returns.
        """
        self.add_file(state_file(number), pack_state(state))
        if number == 0:
            # Without state 0 the steps that are logged from now on could not be replayed.
            self._thread.wait()

    def drop_states(self, numbers: Iterable[int]) -> None:
        """Delete states."""
        names = frozenset(state_file(number) for number in numbers)
        if names:
            self._thread.submit(partial(self._drop, names))

    def keep_batches(self, step: int, batches: tuple[Batch, ...]) -> None:
        """Store the batches of a step.

        Not in the background: the step's log entry, written next, says that they are there.
        """
        with replacing(self.folder / batches_file(step)) as scratch:
            scratch.write_bytes(pack_batches(batches))

    def log(self, step: Step) -> None:
        """Append a completed step to the log."""
        journal.append(self.folder / journal_file(self._journal_start), step)
        self._journal.append(step)
        if len(self._journal) == SEGMENT:
            self._seal_journal()

    def finish(self) -> None:
        """Finish a recording that ended without an error."""
        self._seal_journal()
        self.close()
        # Last of all, so that `finished` is true only where every file is there.
        self.manifest = self.manifest.closed()
        write_manifest(self.folder, self.manifest)

    def close(self) -> None:
        """Wait for pending files and end the thread; the manifest still says `finished: false`."""
        self._thread.close()

    def add_file(self, name: str, content: bytes) -> None:
        """Write a file, then its name and checksum into the manifest, both in the background."""
        self._thread.wait()
        self._thread.submit(partial(self._add, name, content))
        if len(content) > MAX_IN_BACKGROUND:
            self._thread.wait()

    def _seal_journal(self) -> None:
        """Turn the journal into a Parquet segment.

        The journal is deleted after the manifest names the segment. Until then a reader takes the
        journal, from then on the segment, so no step is lost or read twice. Steps that are made in
        the meantime go into the next journal.
        """
        if not self._journal:
            return
        content = BytesIO()
        journal.to_table(self._journal).write_parquet(content, compression="zstd")
        self.add_file(segment_file(self._journal_start), content.getvalue())
        journal_path = self.folder / journal_file(self._journal_start)
        self._thread.submit(journal_path.unlink)
        self._journal_start += len(self._journal)
        self._journal = []

    def _add(self, name: str, content: bytes) -> None:
        with replacing(self.folder / name) as scratch:
            scratch.write_bytes(content)
        self.manifest = self.manifest.with_file(name, checksum(content))
        write_manifest(self.folder, self.manifest)

    def _drop(self, names: frozenset[str]) -> None:
        # The manifest first: it must never name a file that is gone.
        self.manifest = self.manifest.without_files(names)
        write_manifest(self.folder, self.manifest)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def state_file(number: int) -> str:
    """Name of the file of a state."""
    return f"states/{number:08d}.safetensors"


def segment_file(first: int) -> str:
    """Name of a finished segment of the step log, by its first step."""
    return f"steps/{first:08d}.parquet"


def journal_file(first: int) -> str:
    """Name of the journal, by its first step."""
    return f"steps/{first:08d}.journal"


def batches_file(step: int) -> str:
    """Name of the file with the stored batches of a step."""
    return f"batches/{step:08d}.safetensors"
