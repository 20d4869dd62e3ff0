"""The cotangents at the last two shard boundaries, so that a killed attribution goes on to the same bits."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import final

from backtrail.errors import DamagedFile
from backtrail.run.files import replacing
from backtrail.run.tensors import pack_state, unpack_state
from backtrail.step.state import State
from backtrail.sweep.adjoint import Cotangent

KEPT = 2


@final
@dataclass(frozen=True, slots=True)
class CotangentStore:
    """Beside an influence on disk; nothing where the influence is in memory."""

    folder: Path | None

    def save(self, step: int, cotangent: Cotangent | None) -> None:
        """Keep the cotangents of the state before a step, and drop all but the last two."""
        if self.folder is None:
            return
        with replacing(self._file(step)) as scratch:
            # A cotangent has a state's structure: a tensor for every parameter, buffer and moment.
            parts = (
                State({}, {}, {})
                if cotangent is None
                else State(cotangent.params, cotangent.buffers, cotangent.moments)
            )
            scratch.write_bytes(pack_state(parts))
        for old in sorted(self._file(step).parent.glob("*.safetensors"))[KEPT:]:
            old.unlink()

    def load(self, step: int) -> Cotangent | None:
        """Read the cotangents of the state before a step; None if no query was on its way there.

        Raises:
            DamagedFile: the file is missing or unreadable.
        """
        path = self._file(step)
        try:
            state = unpack_state(path.read_bytes())
        except Exception as error:
            raise DamagedFile(path, str(error)) from error
        return Cotangent(state.params, state.buffers, state.moments) if state.params else None

    def clear(self) -> None:
        """Remove what only a resumption needs."""
        if self.folder is not None:
            shutil.rmtree(self.folder / "cotangents", ignore_errors=True)

    def _file(self, step: int) -> Path:
        return (self.folder or Path()) / "cotangents" / f"{step:08d}.safetensors"
