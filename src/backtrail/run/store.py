"""The files of a run folder.

manifest.json                     written after every file that it names
states/00000050.safetensors       state 50
steps/00000000.parquet            the step log from step 0 on
steps/00001000.journal            the steps since, one line each, written as they happen
batches/00000012.safetensors      what step 12 was fed, where it cannot be read again
rows/00000000.safetensors         what was captured beside the steps from 0 on
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
from backtrail.run.background import Aside
from backtrail.run.files import checksum, read_checked, replacing
from backtrail.run.manifest import Manifest, write_manifest
from backtrail.run.tensors import digest, pack_batches, pack_state, unpack_batches, unpack_state
from backtrail.step.state import BatchRecord, State, Step
from backtrail.task.task import Batch

SEGMENT = 1000  # steps of a journal before it becomes Parquet
LARGE = 2**28  # bytes of a file that a training waits for, rather than hold them while it goes on


@final
@dataclass(frozen=True, slots=True)
class Store:
    """Reads the files of a run."""

    folder: Path
    manifest: Manifest

    def states(self) -> list[int]:
        """Numbers of the states on disk, in order."""
        return sorted(
            int(Path(name).stem) for name in self.manifest.files if name.startswith("states/")
        )

    def state(self, number: int) -> State:
        """Read one state.

        Raises:
            DamagedFile: the file is missing or changed.
        """
        name = state_file(number)
        return unpack_state(read_checked(self.folder, name, self.manifest.files[name]))

    def batches(self, step: int, fed: Sequence[BatchRecord]) -> tuple[Batch, ...]:
        """Read what one step was fed; None stands where a batch was not stored.

        Raises:
            DamagedFile: the file is missing, unreadable or changed.
        """
        path = self.folder / batches_file(step)
        try:
            batches = unpack_batches(path.read_bytes())
        except Exception as error:
            raise DamagedFile(path, str(error)) from error
        for place, (one, batch) in enumerate(zip(fed, batches, strict=True)):
            if one.stored and (found := digest(batch)) != one.digest:
                raise DamagedFile(
                    path, f"batch {place} of it has checksum {found}, and had {one.digest}"
                )
        return batches

    def log(self) -> Iterator[Step]:
        """All whole steps, in order.

        Raises:
            DamagedFile: a segment is missing or changed, or the journal has a gap.
        """
        steps = [step for name in self._segments() for step in self._segment(name)]
        yield from steps
        path = self.folder / journal_file(len(steps))
        try:
            tail = journal.read(path) if path.is_file() else []
        except msgspec.DecodeError as error:
            raise DamagedFile(path, f"a line of it does not parse ({error})") from error
        for expected, step in enumerate(tail, len(steps)):
            if step.index != expected:
                raise DamagedFile(path, f"step {step.index} stands where step {expected} belongs")
            yield step

    def _segments(self) -> list[str]:
        return sorted(name for name in self.manifest.files if name.startswith("steps/"))

    def _segment(self, name: str) -> list[Step]:
        content = read_checked(self.folder, name, self.manifest.files[name])
        return journal.steps_of(pl.read_parquet(BytesIO(content)))


@final
class Writer:
    """Writes the files of a run, each at once, the manifest after them.

    Files are written beside the training, in order; the next waits for the one before, so that at
    most one is in memory. What went wrong with a file is raised by the next, or at the end.

    Raises:
        OSError: from any method; a file could not be written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest  # belongs to the thread beside, while that has work
        self._aside = Aside()
        self._tail: list[Step] = []
        self._first = 0
        write_manifest(folder, manifest)
        (folder / "steps").mkdir(exist_ok=True)

    def keep_state(self, number: int, state: State) -> None:
        """Keep one state."""
        self.add(state_file(number), pack_state(state))
        if number == 0:  # whose absence would make the steps that are logged from now on worthless
            self._aside.wait()

    def drop_states(self, numbers: Iterable[int]) -> None:
        """Forget states; the manifest forgets them first."""
        names = frozenset(state_file(number) for number in numbers)
        if names:
            self._aside(partial(self._drop, names))

    def keep_batches(self, step: int, batches: tuple[Batch, ...]) -> None:
        """Keep what a step was fed; the step's log entry, written later, says that it is there."""
        with replacing(self.folder / batches_file(step)) as scratch:
            scratch.write_bytes(pack_batches(batches))

    def log(self, step: Step) -> None:
        """Add a whole step to the log."""
        journal.append(self.folder / journal_file(self._first), step)
        self._tail.append(step)
        if len(self._tail) == SEGMENT:
            self._seal()

    def finish(self) -> None:
        """Say that the recording ended in order."""
        self._seal()
        self.leave()
        self.manifest = self.manifest.closed()
        write_manifest(self.folder, self.manifest)

    def leave(self) -> None:
        """Let what is on its way get there; the recording stays open."""
        self._aside.close()

    def add(self, name: str, content: bytes) -> None:
        """Write a file of the run, and then its name and checksum into the manifest."""
        self._aside.wait()
        self._aside(partial(self._add, name, content))
        if len(content) > LARGE:
            self._aside.wait()

    def _seal(self) -> None:
        """Turn the journal into a segment; until the manifest names the segment, the journal counts."""
        if not self._tail:
            return
        content = BytesIO()
        journal.table(self._tail).write_parquet(content, compression="zstd")
        self.add(segment_file(self._first), content.getvalue())
        self._aside((self.folder / journal_file(self._first)).unlink)
        self._first += len(self._tail)
        self._tail = []

    def _add(self, name: str, content: bytes) -> None:
        with replacing(self.folder / name) as scratch:
            scratch.write_bytes(content)
        self.manifest = self.manifest.with_file(name, checksum(content))
        write_manifest(self.folder, self.manifest)

    def _drop(self, names: frozenset[str]) -> None:
        self.manifest = self.manifest.without_files(names)
        write_manifest(self.folder, self.manifest)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def state_file(number: int) -> str:
    """Name of a state's file."""
    return f"states/{number:08d}.safetensors"


def segment_file(first: int) -> str:
    """Name of a finished segment of the step log."""
    return f"steps/{first:08d}.parquet"


def journal_file(first: int) -> str:
    """Name of the growing end of the step log."""
    return f"steps/{first:08d}.journal"


def batches_file(step: int) -> str:
    """Name of the file with what a step was fed."""
    return f"batches/{step:08d}.safetensors"
