"""Rows that were captured while a training ran: files of its recording, each of a stretch of steps.

rows/00000000.safetensors    what the steps from 0 on left, with the settings that they were captured with
"""

import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import final

import torch
from safetensors.torch import load, save

from backtrail.methods.dve.step_features import Arrays
from backtrail.run.files import read_checked
from backtrail.run.run import Run

log = logging.getLogger(__name__)
Settings = Mapping[str, object]
BYTES, STEPS = 4 * 2**20, 100  # after which a stretch is written
TOLD = "settings"


@final
class RowsWriter:
    """Writes stretches of steps.

    Args:
        keep: adds a file to the recording.
        settings: that the rows depend on.
    """

    def __init__(self, keep: Callable[[str, bytes], None], settings: Settings) -> None:
        self._keep = keep
        self._told = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
        self._waiting: dict[int, Arrays] = {}
        self._bytes = 0
        self._unproven: list[str] = []  # files since the last proof

    def add(self, step: int, arrays: Arrays) -> None:
        """Add what a step left."""
        self._waiting[step] = {name: tensor.cpu().contiguous() for name, tensor in arrays.items()}
        self._bytes += sum(tensor.nbytes for tensor in arrays.values())
        if self._bytes >= BYTES or len(self._waiting) >= STEPS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            found = {
                f"{step}:{name}": rows
                for step, arrays in self._waiting.items()
                for name, rows in arrays.items()
            }
            self._unproven.append(f"rows/{min(self._waiting):08d}.safetensors")
            self._keep(self._unproven[-1], save(found | {TOLD: self._told}))
        self._waiting, self._bytes = {}, 0

    def proven(self) -> None:
        """What was added so far is right."""
        self._unproven.clear()

    def distrust(self) -> None:
        """Take back what was added since it was last known to be right."""
        self._waiting, self._bytes = {}, 0
        for name in self._unproven:
            self._keep(name, save({TOLD: self._told}))


@final
class KeptRows:
    """Reads them back, one file at a time.

    Args:
        run: the recording.
        settings: that the rows must have been captured with; others count as none.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        self._run, self._settings = run, settings
        self._names = sorted(name for name in run.manifest.files if name.startswith("rows/"))
        self._firsts = [int(name.partition("/")[2].partition(".")[0]) for name in self._names]
        self._loaded: tuple[str, dict[int, Arrays]] = "", {}

    def step(self, step: int) -> Arrays | None:
        """What was captured at a step, with its losses; None where nothing was.

        Raises:
            DamagedFile: a file is missing, or its content changed.
        """
        place = bisect_right(self._firsts, step) - 1
        if place < 0:
            return None
        if self._loaded[0] != self._names[place]:
            self._loaded = self._names[place], self._read(self._names[place])
        return self._loaded[1].get(step)

    def _read(self, name: str) -> dict[int, Arrays]:
        tensors = load(read_checked(self._run.path, name, self._run.manifest.files[name]))
        told = json.loads(bytes(tensors.pop(TOLD).numpy()))
        if told != self._settings:
            differing = (
                f"{key}={told[key]!r}" for key in told if told[key] != self._settings.get(key)
            )
            log.warning(
                "%s was captured with %s: those steps are replayed instead",
                name,
                ", ".join(differing),
            )
            return {}
        found: dict[int, Arrays] = {}
        for key, tensor in tensors.items():
            step, _, array = key.partition(":")
            found.setdefault(int(step), {})[array] = tensor
        return found
