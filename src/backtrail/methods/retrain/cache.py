"""Re-runs kept on disk: a training that was run once without some samples answers any later query.

A file holds one stack of re-runs: the observed states of each, the unperturbed run first and last.
It is written whole or not at all, so a folder that was being filled when the process died keeps
every finished stack.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backtrail.errors import BadSetting, DamagedBank, OtherRun
from backtrail.methods.retrain.stacks import ObservedStates, Reruns, RunStack
from backtrail.methods.retrain.weights import Removal, Steps
from backtrail.queries import Averaged
from backtrail.run.files import replacing
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.tree import Tree


class Header(msgspec.Struct, frozen=True):
    """What a file of re-runs holds.

    Attributes:
        run: id of the training.
        dtype: precision of the re-runs, like "torch.float64".
        observed_at: the requested states. Those before the stack's first change are not stored,
            since they are as recorded.
        samples: the samples of each removal, in order.
        steps: the steps (a, b) in which they were removed.
        renormalize: whether the other samples shared their weight.
        weight: the weight that they kept.
    """

    run: str
    dtype: str
    observed_at: tuple[int, ...]
    samples: tuple[tuple[int, ...], ...]
    steps: Steps
    renormalize: bool
    weight: float

    def removals(self) -> list[Removal]:
        """The removals of the stack."""
        return [
            Removal(frozenset(group), self.steps, self.renormalize, self.weight)
            for group in self.samples
        ]


@final
@dataclass(frozen=True, slots=True)
class RerunCache:
    """A folder of re-runs of one training in one precision: the `bank=` of `backtrail.retrain`."""

    folder: Path
    run: Run
    dtype: torch.dtype | None

    def stored(self, observed_at: Sequence[int]) -> Iterator[tuple[Path, list[Removal]]]:
        """The files that have all the observed states, and the removals in each.

        Raises:
            OtherRun: the folder holds re-runs of another training.
            DamagedBank: a file cannot be read.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            header = _read_header(path)
            if header.run != self.run.id:
                raise OtherRun(self.folder, header.run, run=self.run.path, given=self.run.id)
            if header.dtype == str(self.dtype) and set(observed_at) <= set(header.observed_at):
                yield path, header.removals()

    def read(self, path: Path, rows: Sequence[int], observed_at: Sequence[int]) -> ObservedStates:
        """Observed states of some removals of a file, between the two unperturbed runs."""
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for number in observed_at:
                state = State({}, {})
                for name in names:
                    stored_number, kind, key = name.split(":", 2)
                    if int(stored_number) != number:
                        continue
                    stack = file.get_tensor(name)
                    # Row 0 and the last row are the unperturbed runs.
                    wanted = [0, *(1 + row for row in rows), len(stack) - 1]
                    tree = state.params if kind == "param" else state.buffers
                    tree[key] = stack[wanted]
                if state.params:
                    yield number, state.cast(None, self.run.task.device)

    def write(
        self, removals: Sequence[Removal], states: ObservedStates, observed_at: Sequence[int]
    ) -> Path:
        """Write a stack, and return its file."""
        first = removals[0]  # all removals of one call differ in their samples alone
        header = Header(
            run=self.run.id,
            dtype=str(self.dtype),
            observed_at=tuple(observed_at),
            samples=tuple(tuple(sorted(removal.samples)) for removal in removals),
            steps=first.steps,
            renormalize=first.renormalize,
            weight=first.weight,
        )
        encoded = msgspec.json.encode(header)
        tensors: Tree = {}
        for number, state in states:
            for name, tensor in state.params.items():
                tensors[f"{number}:param:{name}"] = _storable(tensor)
            for name, tensor in state.buffers.items():
                tensors[f"{number}:buffer:{name}"] = _storable(tensor)
        path = self.folder / f"{hashlib.sha256(encoded).hexdigest()[:16]}.safetensors"
        with replacing(path) as scratch:
            save_file(tensors, scratch, {"head": encoded.decode()})
        return path


def cached_stacks(
    cache: RerunCache, reruns: Reruns, removals: Sequence[Removal]
) -> Iterator[RunStack]:
    """The stacks of all removals: from the cache where it has them, otherwise run and stored first.

    Raises:
        BadSetting: the folder is a file; or the queries read an average over the training, of which
            single states say nothing.
    """
    if cache.folder.is_file():
        raise BadSetting(
            "bank", str(cache.folder), "a folder, which need not exist yet; this is a file"
        )
    if isinstance(reruns.queries, Averaged):
        raise BadSetting(
            "bank",
            str(cache.folder),
            "None where queries are Averaged, since a bank stores single states",
        )
    observed_at = reruns.observed_at
    missing = set(range(len(removals)))
    for path, stored in cache.stored(observed_at):
        row_of = {removal: row for row, removal in enumerate(stored)}
        found = [place for place in sorted(missing) if removals[place] in row_of]
        if found:
            missing -= set(found)
            rows = [row_of[removals[place]] for place in found]
            yield RunStack(found, cache.read(path, rows, observed_at))
    left = sorted(missing)
    for stack in reruns.stacks([removals[place] for place in left]):
        places = [left[place] for place in stack.places]
        path = cache.write([removals[place] for place in places], stack.states, observed_at)
        # Read back rather than passed on, so that a first call gives what later ones will.
        yield RunStack(places, cache.read(path, range(len(places)), observed_at))


def _storable(tensor: Tensor) -> Tensor:
    """A copy with a storage of its own, as safetensors requires."""
    return tensor.detach().cpu().contiguous().clone()


def _read_header(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt") as file:
            return msgspec.json.decode(file.metadata()["head"], type=Header)
    except (KeyError, TypeError) as error:
        raise DamagedBank(path, "it does not say what was removed") from error
    except (SafetensorError, msgspec.DecodeError) as error:
        raise DamagedBank(path, str(error)) from error
