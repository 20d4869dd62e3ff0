"""Rows that were captured during training: files of the recording, each for a stretch of steps.

rows/00000000.safetensors    arrays of the steps from 0 on, and the settings they depend on
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
# A file is written after so many bytes or steps.
FILE_BYTES = 4 * 2**20
FILE_STEPS = 100
# Name of the tensor that holds the settings as JSON.
SETTINGS = "settings"


@final
class RowsWriter:
    """Writes the arrays of steps, several steps to a file.

    Args:
        keep: Adds a file to the recording.
        settings: What the arrays depend on.
    """

    def __init__(self, keep: Callable[[str, bytes], None], settings: Settings) -> None:
        self._keep = keep
        encoded = bytearray(json.dumps(settings).encode())
        self._settings = torch.frombuffer(encoded, dtype=torch.uint8)
        self._waiting: dict[int, Arrays] = {}
        self._waiting_bytes = 0
        # Files since the arrays were last compared with a replay.
        self._unverified: list[str] = []

    def add(self, step: int, arrays: Arrays) -> None:
        """Add the arrays of a step."""
        self._waiting[step] = {name: tensor.cpu().contiguous() for name, tensor in arrays.items()}
        self._waiting_bytes += sum(tensor.nbytes for tensor in arrays.values())
        if self._waiting_bytes >= FILE_BYTES or len(self._waiting) >= FILE_STEPS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            tensors = {SETTINGS: self._settings}
            for step, arrays in self._waiting.items():
                for name, rows in arrays.items():
                    tensors[f"{step}:{name}"] = rows
            file = f"rows/{min(self._waiting):08d}.safetensors"
            self._unverified.append(file)
            self._keep(file, save(tensors))
        self._discard()

    def verified(self) -> None:
        """Note that everything added so far agrees with a replay."""
        self._unverified.clear()

    def take_back(self) -> None:
        """Take back everything that was added since the last call of `verified`."""
        self._discard()
        for file in self._unverified:
            # An empty file: its steps are replayed.
            self._keep(file, save({SETTINGS: self._settings}))

    def _discard(self) -> None:
        self._waiting = {}
        self._waiting_bytes = 0


@final
class KeptRows:
    """Reads captured arrays back, one file at a time.

    Args:
        run: The recording.
        settings: What the arrays must depend on; those with other settings are not used.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        self._run = run
        self._settings = settings
        self._names = sorted(name for name in run.manifest.files if name.startswith("rows/"))
        self._first_steps = [_first_step(name) for name in self._names]
        # The file that was read last, and the arrays in it by step.
        self._loaded: tuple[str, dict[int, Arrays]] = "", {}

    def step(self, step: int) -> Arrays | None:
        """The arrays of a step with its losses; None where nothing was captured.

        Raises:
            DamagedFile: A file is missing, or its content changed.
        """
        place = bisect_right(self._first_steps, step) - 1
        if place < 0:
            return None
        name = self._names[place]
        if self._loaded[0] != name:
            self._loaded = name, self._read(name)
        return self._loaded[1].get(step)

    def _read(self, name: str) -> dict[int, Arrays]:
        tensors = load(read_checked(self._run.path, name, self._run.manifest.files[name]))
        captured_with = json.loads(bytes(tensors.pop(SETTINGS).numpy()))
        if captured_with != self._settings:
            differing = [
                f"{key}={value!r}"
                for key, value in captured_with.items()
                if value != self._settings.get(key)
            ]
            settings = ", ".join(differing)
            log.warning("%s was captured with %s: its steps are replayed.", name, settings)
            return {}
        by_step: dict[int, Arrays] = {}
        for key, tensor in tensors.items():
            step, _, array = key.partition(":")
            by_step.setdefault(int(step), {})[array] = tensor
        return by_step


def _first_step(name: str) -> int:
    return int(name.removeprefix("rows/").removesuffix(".safetensors"))
