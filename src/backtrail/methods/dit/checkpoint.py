"""The cotangents at the last two shard boundaries, so that a killed attribution resumes.

Resuming from them gives results that are bit-identical to those of an uninterrupted sweep.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import final

from backtrail.errors import DamagedFile
from backtrail.run.files import replacing
from backtrail.run.tensors import pack_state, unpack_state
from backtrail.step.state import State
from backtrail.sweep.adjoint import Cotangent

# A kill between saving the cotangents of a shard and marking it done leaves the shard before it as
# the one to resume from, so one file is not enough.
KEPT = 2


@final
@dataclass(frozen=True, slots=True)
class CotangentStore:
    """Files beside an influence on disk; does nothing for an influence in memory.

    Attributes:
        folder: Of the influence; None if it is in memory.
    """

    folder: Path | None

    def save(self, step: int, cotangent: Cotangent | None) -> None:
        """Keep the cotangents of the state before a step, and drop all but the last two.

        Args:
            step: Its index.
            cotangent: None if no query reads a state from there on.
        """
        if self.folder is None:
            return
        # A cotangent has a state's structure: a tensor for every parameter, buffer and moment.
        packed = State({}, {}, {})
        if cotangent is not None:
            packed = State(cotangent.params, cotangent.buffers, cotangent.moments)
        path = self._file(step)
        with replacing(path) as scratch:
            scratch.write_bytes(pack_state(packed))
        # The sweep runs backwards, so the newest files have the smallest numbers.
        for old in sorted(path.parent.glob("*.safetensors"))[KEPT:]:
            old.unlink()

    def load(self, step: int) -> Cotangent | None:
        """Read the cotangents of the state before a step; None if there were none.

        Raises:
            DamagedFile: The file is missing or unreadable.
        """
        path = self._file(step)
        try:
            state = unpack_state(path.read_bytes())
        except Exception as error:
            raise DamagedFile(path, str(error)) from error
        if not state.params:
            return None
        return Cotangent(state.params, state.buffers, state.moments)

    def clear(self) -> None:
        """Remove all files; a finished attribution does not need them."""
        if self.folder is not None:
            shutil.rmtree(self.folder / "cotangents", ignore_errors=True)

    def _file(self, step: int) -> Path:
        return (self.folder or Path()) / "cotangents" / f"{step:08d}.safetensors"
