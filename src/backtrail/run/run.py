"""A recorded training, joined with the task that explains it."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Int64
from tqdm.auto import tqdm

from backtrail.errors import EmptyRun, MissingState, NoSuchState, ReplayMismatch, WrongData
from backtrail.exclusive import exclusive, exclusive_steps
from backtrail.run import journal
from backtrail.run.check import check_data, check_model
from backtrail.run.manifest import Manifest, read_manifest
from backtrail.run.store import Store
from backtrail.run.tensors import digest
from backtrail.step.state import State, Step
from backtrail.step.step import Transition
from backtrail.step.update import Update
from backtrail.task.task import Batch, Task
from backtrail.tree import cast, norm

Precision = torch.dtype | None
AUTOCAST = 5e-2  # relative rounding of a gradient in bfloat16


@final
@dataclass(frozen=True)
class Run:
    """A finished recording; read-only.

    States are numbered 0 … T (`run.steps`): state t is what step t started from, state T is the
    result.
    """

    store: Store
    task: Task
    log: tuple[Step, ...]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.store.folder

    @property
    def manifest(self) -> Manifest:
        """The head of the recording."""
        return self.store.manifest

    @property
    def id(self) -> str:
        """Random name of the run."""
        return self.manifest.id

    @property
    def steps(self) -> int:
        """T, the number of whole steps."""
        return len(self.log)

    @property
    def samples(self) -> int:
        """Number of rows of the training set; of those seen, where samples have ids of their own."""
        return len(self.ids) if self.manifest.samples is None else self.manifest.samples

    @cached_property
    def ids(self) -> Int64[np.ndarray, " sample"]:
        """Every sample in order: row numbers of the training set, or the ids that were seen."""
        return self.seen if self.manifest.samples is None else np.arange(self.manifest.samples)

    @cached_property
    def seen(self) -> Int64[np.ndarray, " seen"]:
        """The samples that were in some batch, in order."""
        return np.unique(
            np.concatenate([np.asarray(step.samples, dtype=np.int64) for step in self.log])
        )

    @property
    def has_ids(self) -> bool:
        """Whether samples have ids of their own."""
        return self.manifest.samples is None

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """States that are on disk."""
        return tuple(number for number in self.store.states() if number <= self.steps)

    @cached_property
    def epochs(self) -> tuple[int, ...]:
        """States at the end of every epoch."""
        numbers = [step.fed[-1].epoch for step in self.log]
        ends = [t for t in range(1, self.steps) if numbers[t] != numbers[t - 1]]
        return (*ends, self.steps)

    @property
    def trained(self) -> tuple[str, ...]:
        """Parameters that the optimizer holds."""
        return tuple(name for group in self.manifest.groups for name in group)

    def table(self) -> pl.DataFrame:
        """The step log, one row per step."""
        return journal.table(self.log)

    def step(self, index: int) -> Step:
        """What is known of one step.

        Raises:
            NoSuchState: the run has no such step.
        """
        if not 0 <= index < self.steps:
            raise NoSuchState(index, self.steps - 1, "step")
        return self.log[index]

    def batches(self, index: int) -> tuple[Batch, ...]:
        """What the loop fed to the model in one step, as it was stored, or read again from the data set."""
        fed = self.step(index).fed
        stored = (
            self.store.batches(index, fed) if any(one.stored for one in fed) else [None] * len(fed)
        )
        return tuple(
            content if one.stored else self.task.batch(one.samples)
            for one, content in zip(fed, stored, strict=True)
        )

    def transition(self, index: int, dtype: Precision = None) -> Transition:
        """One step as a function from state to state, in the recorded precision or another."""
        step = self.step(index)
        update = Update(self.manifest.optimizer, self.manifest.groups, step.settings)
        return Transition(
            self.task, update, step, cast(self.batches(index), dtype, self.task.device)
        )

    @exclusive
    def state(self, number: int, *, replay: bool = False, dtype: Precision = None) -> State:
        """One state, from disk; with `replay`, re-run from the nearest kept state before it where needed.

        Raises:
            NoSuchState: the run has no such state.
            MissingState: it was not kept, and `replay` is off.
        """
        if not 0 <= number <= self.steps:
            raise NoSuchState(number, self.steps, "state")
        if number not in self.kept and not replay:
            raise MissingState(number, self.kept)
        nearest = self.kept[bisect_right(self.kept, number) - 1]
        state = self.store.state(nearest).cast(dtype, self.task.device)
        for index in range(nearest, number):
            state = self.transition(index, dtype).advance(state)
        return state

    @exclusive_steps
    def walk(self, first: int, last: int, dtype: Precision = None) -> Iterator[tuple[int, State]]:
        """The states first ... last with their numbers, in order: from disk where they were kept, else replayed.

        Raises:
            NoSuchState: the run has no such state.
        """
        state = self.state(first, replay=True, dtype=dtype)
        yield first, state
        for number in range(first + 1, last + 1):
            kept = number in self.kept
            state = (
                self.state(number, dtype=dtype)
                if kept
                else self.transition(number - 1, dtype).advance(state)
            )
            yield number, state

    @exclusive
    def verify(self, *, tolerance: float | None = None) -> "Verification":
        """Replay every segment between kept states and compare it with what was recorded.

        Args:
            tolerance: relative difference allowed at the end of a segment of up to 50 steps (more
                in proportion); default 1e-9 in float64, 5e-2 for a training under autocast, else
                1e-4.

        Raises:
            ReplayMismatch: the first step that differs, or the segment that does not meet the next
                kept state.
            WrongData: a batch whose content is not what was fed.
        """
        segments = list(zip(self.kept, (*self.kept[1:], self.steps), strict=True))
        worst = Verification(self.steps, len([1 for a, b in segments if b > a]), 0.0)
        with tqdm(
            total=self.steps - self.kept[0],
            desc="replaying",
            unit="step",
            disable=None,
            leave=False,
        ) as bar:
            for start, stop in segments:
                worst = self._verify_segment(start, stop, tolerance=tolerance, worst=worst, bar=bar)
        return worst

    def _verify_segment(
        self,
        start: int,
        stop: int,
        *,
        tolerance: float | None,
        worst: "Verification",
        bar: "tqdm[object]",
    ) -> "Verification":
        state, autocast = self.state(start), any(step.autocast for step in self.log[start:stop])
        allowed = (tolerance or default_tolerance(state, autocast=autocast)) * max(
            1.0, (stop - start) / 50
        )
        for index in range(start, stop):
            worst = worst.under(self.step(index).autocast, self._gap(index, state))
            state = self._verify_step(index, state, allowed)
            bar.update()
        if stop not in self.kept:
            return worst
        found = difference(state, self.state(stop))
        if not found <= allowed:
            raise ReplayMismatch(
                stop - 1, f"the state after it (replayed from state {start})", (found, allowed)
            )
        return replace(worst, difference=max(worst.difference, found))

    def _gap(self, index: int, state: State) -> float:
        """How far the gradient under autocast, which trained the model, is from the one that the influence is of."""
        if not self.step(index).autocast:
            return 0.0
        transition = self.transition(index)
        trained, plain = (
            transition.raw_gradient(state, autocast=autocast)[0] for autocast in (True, False)
        )
        return norm({name: plain[name] - trained[name] for name in plain}) / max(norm(plain), 1e-30)

    def _verify_step(self, index: int, state: State, allowed: float) -> State:
        step = self.step(index)
        for place, (fed, batch) in enumerate(zip(step.fed, self.batches(index), strict=True)):
            if digest(batch) != fed.digest:
                raise WrongData(
                    f"batch {place} of step {index} reads {digest(batch)}, and was {fed.digest}"
                )
        transition = self.transition(index)
        grads, buffers, _ = transition.raw_gradient(state)
        consumed = transition.clipped(grads)
        off = abs(norm(consumed) - step.norm) / max(step.norm, 1e-30)
        if not off <= allowed:
            raise ReplayMismatch(index, "the norm of its gradient", (off, allowed))
        return transition.moved(state, consumed, buffers)

    def __repr__(self) -> str:
        """One line: steps, samples, kept states, optimizer."""
        end = "" if self.manifest.finished else ", stopped before its end"
        return (
            f"Run({str(self.path)!r}: {self.steps} steps of {self.manifest.optimizer} on {self.samples} samples, "
            f"{len(self.kept)} states kept{end})"
        )


@final
@dataclass(frozen=True, slots=True)
class Verification:
    """What :meth:`backtrail.Run.verify` found.

    >>> print(Verification(steps=40, segments=2, difference=1e-7))
    40 steps replayed in 2 segments; largest relative difference 1.0e-07

    Attributes:
        steps: Number of replayed steps.
        segments: Number of segments between kept states.
        difference: Largest relative difference where a segment ended at a kept state.
        autocast: Precision of the training's autocast, for example "bfloat16"; empty without.
        gap: Largest relative difference over the steps between the gradient under autocast and the
            one in the precision of the parameters, which influence is the derivative of.
    """

    steps: int
    segments: int
    difference: float
    autocast: str = ""
    gap: float = 0.0

    def under(self, autocast: str, gap: float) -> "Verification":
        """The same, after a step under autocast."""
        return replace(self, autocast=autocast or self.autocast, gap=max(self.gap, gap))

    def __str__(self) -> str:
        """One sentence, or two."""
        replayed = f"{self.steps} steps replayed in {self.segments} segments"
        found = f"{replayed}; largest relative difference {self.difference:.1e}"
        if not self.autocast:
            return found
        if not self.gap:
            return f"{found}. Trained under autocast {self.autocast}; replayed and attributed without it"
        return (
            f"{found}. Trained, and replayed, under autocast {self.autocast}; the influence is taken without it, where "
            f"gradients differ by up to {self.gap:.1e}"
        )


def open_run(path: str | Path, task: Task) -> Run:
    """Open a recording, also one that was killed: it then ends at its last whole step.

    Raises:
        NotARun: the folder holds no recording.
        EmptyRun: no step was completed.
        WrongModel: the task's model has other tensors.
        WrongData: the task's data set has another length or other rows.
        DamagedFile: a file is missing or changed; the message names it.
    """
    folder = Path(path)
    store = Store(folder, read_manifest(folder))
    check_model(store.manifest, task)
    run = Run(store, task, tuple(store.log()))
    if not run.log:
        raise EmptyRun(folder)
    check_data(store.manifest, task, run.log[0])
    return run


def default_tolerance(state: State, *, autocast: bool = False) -> float:
    """How far a replay may be off after 50 steps, by precision: under autocast, other kernels round much coarser."""
    if all(tensor.dtype == torch.float64 for tensor in state.params.values()):
        return 1e-9
    return AUTOCAST if autocast else 1e-4


def difference(left: State, right: State) -> float:
    """Norm of the difference of all parameters and buffers, relative to the norm of the second."""
    ours, theirs = (cast(s.params | s.buffers, torch.float64) for s in (left, right))
    gap = norm({name: tensor.double() - theirs[name].double() for name, tensor in ours.items()})
    return gap / max(norm({name: tensor.double() for name, tensor in theirs.items()}), 1e-30)
