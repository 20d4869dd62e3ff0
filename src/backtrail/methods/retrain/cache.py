"""Re-run trainings on disk: what was trained once without some samples answers every later question about it.

A file holds one stack of re-runs: the observed states of each, the unperturbed run first and last.
It is written whole or not at all, so a bank that was being filled when the process died keeps every
finished stack.
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

from backtrail.errors import BadSetting, DamagedBank, OtherRun
from backtrail.methods.retrain.stacks import Observed, Rerunning, Stack
from backtrail.methods.retrain.weights import Removal, Steps
from backtrail.queries import Averaged
from backtrail.run.files import replacing
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.tree import Tree, each


class Kept(msgspec.Struct, frozen=True):
    """What a file of a bank holds.

    Attributes:
        run: id of the training.
        dtype: precision of the re-runs, like "torch.float64".
        observed_at: the states asked for; those before the stack's first change are as they were,
            and not there.
        samples: the samples of every removal, in order.
        steps: where they were removed.
        renormalize: whether the others shared their weight.
        weight: what weight they kept.
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
            Removal(frozenset(s), self.steps, self.renormalize, self.weight) for s in self.samples
        ]


@final
@dataclass(frozen=True, slots=True)
class Bank:
    """A folder of re-runs of one training in one precision."""

    folder: Path
    run: Run
    dtype: torch.dtype | None

    def kept(self, observed_at: Sequence[int]) -> Iterator[tuple[Path, list[Removal]]]:
        """The files that have all the observed states, and the removals in each.

        Raises:
            OtherRun: the folder is a bank of another training.
            DamagedBank: a file cannot be read.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            head = _head(path)
            if head.run != self.run.id:
                raise OtherRun(self.folder, head.run, run=self.run.path, given=self.run.id)
            if head.dtype == str(self.dtype) and set(observed_at) <= set(head.observed_at):
                yield path, head.removals()

    def read(self, path: Path, rows: Sequence[int], observed_at: Sequence[int]) -> Observed:
        """Observed states of some removals of a file, between the unperturbed runs."""
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for number in observed_at:
                found = State({}, {})
                for name in names:
                    at, kind, key = name.split(":", 2)
                    if int(at) == number:
                        whole = file.get_tensor(name)
                        tree = found.params if kind == "param" else found.buffers
                        tree[key] = whole[[0, *(1 + row for row in rows), len(whole) - 1]]
                if found.params:
                    yield number, found.cast(None, self.run.task.device)

    def keep(
        self, removals: Sequence[Removal], states: Observed, observed_at: Sequence[int]
    ) -> Path:
        """Write a stack; the file."""
        one = removals[0]
        samples = tuple(tuple(sorted(removal.samples)) for removal in removals)
        facts = one.steps, one.renormalize, one.weight
        head = msgspec.json.encode(
            Kept(self.run.id, str(self.dtype), tuple(observed_at), samples, *facts)
        )
        tensors: Tree = {}
        for number, state in states:
            tensors |= {f"{number}:param:{name}": tensor for name, tensor in state.params.items()}
            tensors |= {f"{number}:buffer:{name}": tensor for name, tensor in state.buffers.items()}
        path = self.folder / f"{hashlib.sha256(head).hexdigest()[:16]}.safetensors"
        with replacing(path) as scratch:
            save_file(
                each(lambda t: t.detach().cpu().contiguous().clone(), tensors),
                scratch,
                {"head": head.decode()},
            )
        return path


def banked(bank: Bank, again: Rerunning, removals: Sequence[Removal]) -> Iterator[Stack]:
    """The stacks of all removals: from the bank where it has them, else run again and put there first.

    Raises:
        BadSetting: the queries read an average over the training, and a bank has single states; or
            it is no folder.
    """
    if bank.folder.is_file():
        raise BadSetting(
            "bank", str(bank.folder), "a folder, which need not exist yet: this is a file"
        )
    if isinstance(again.queries, Averaged):
        raise BadSetting(
            "bank", bank.folder, "none where queries are Averaged: a bank keeps states, no averages"
        )
    missing = set(range(len(removals)))
    for path, kept in bank.kept(again.observed_at):
        row_of = {removal: row for row, removal in enumerate(kept)}
        found = [place for place in sorted(missing) if removals[place] in row_of]
        if found:
            missing -= set(found)
            yield (
                found,
                bank.read(path, [row_of[removals[place]] for place in found], again.observed_at),
            )
    left = sorted(missing)
    for some, states in again.stacks([removals[place] for place in left]):
        places = [left[place] for place in some]
        path = bank.keep([removals[place] for place in places], states, again.observed_at)
        yield places, bank.read(path, range(len(places)), again.observed_at)


def _head(path: Path) -> Kept:
    try:
        with safe_open(path, framework="pt") as file:
            return msgspec.json.decode(file.metadata()["head"], type=Kept)
    except (KeyError, TypeError) as error:
        raise DamagedBank(path, "it does not say what was left out") from error
    except (SafetensorError, msgspec.DecodeError) as error:
        raise DamagedBank(path, str(error)) from error
