"""A recorded training, joined with the task that replays it."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from backtrail import arguments
from backtrail.errors import (
    BacktrailError,
    BadSetting,
    DamagedFile,
    EmptyRun,
    FedOfAnotherForm,
    MissingState,
    NoSuchState,
    ReplayMismatch,
    WrongData,
)
from backtrail.exclusive import exclusive, exclusive_steps
from backtrail.run import journal
from backtrail.run.check import check_data, check_model
from backtrail.run.manifest import MANIFEST_NAME, Manifest, read_manifest
from backtrail.run.store import Store
from backtrail.run.tensors import digest
from backtrail.step.optimizers import rule_named
from backtrail.step.state import State, Step
from backtrail.step.step import StepCheck, Transition
from backtrail.step.update import Update
from backtrail.task.task import Batch, Task, in_eval_mode
from backtrail.tree import Tree, cast, norm, tree_flatten

Precision = torch.dtype | None
AUTOCAST = 5e-2  # relative rounding of a gradient in bfloat16
# A sweep's kernels are not always the training's, so its steps may differ by this many times what
# `verify` allows, which replays with the training's own.
OTHER_KERNELS = 10.0
# Gradients below this share of the run's largest one are compared relative to that share: of a
# gradient that nearly vanishes, rounding is a large part.
SMALL_GRADIENT = 1e-3
MOVE = 0.01  # of parameters, relative to their mean size
ROUNDING = 1e-10  # of a gradient in float64, relative to its largest entry
TOLERANCE_STEPS = 50  # steps that a tolerance of `verify` is meant for
FLOATING = ("float", "bfloat")  # how the names of real dtypes begin
MOST_KEPT = 32  # states whose steps `check_kept_steps` compares
# The optimizer's tensors are averages of gradients, which differ more than parameters do. What this
# comparison is for, a reset, changes them wholly.
MOMENTS = 10
TINY = 1e-30  # in place of a norm that is zero


@final
@dataclass(frozen=True)
class Run:
    """A recorded training, read-only; `open_run` opens one.

    States are numbered 0 … T, with T = `run.steps`: state t is what step t started from, and
    state T is the result.

    Attributes:
        store: The files of the run.
        task: Model, data and loss of the training.
        log: One entry per completed step, in order.
        tolerance: Relative difference from the recording that replayed steps may have; None for
            the default of the run's precision.
    """

    store: Store
    task: Task
    log: tuple[Step, ...]
    tolerance: float | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        """Unpickle, and tell the task again which buffers the training changes."""
        self.__dict__.update(state)
        self.task.binding.moving.update(self.moving_buffers)

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.store.folder

    @property
    def manifest(self) -> Manifest:
        """Model, optimizer, data and files of the run, as they were recorded."""
        return self.store.manifest

    @property
    def id(self) -> str:
        """Random identifier of the run; its influences carry it."""
        return self.manifest.id

    @property
    def steps(self) -> int:
        """T, the number of completed steps."""
        return len(self.log)

    @property
    def samples(self) -> int:
        """Number of rows of the training set, or of distinct ids where batches carry ids."""
        return len(self.ids) if self.manifest.samples is None else self.manifest.samples

    @cached_property
    def ids(self) -> Int64[np.ndarray, " sample"]:
        """Every sample, ascending: row numbers of the training set, or the ids that occurred."""
        return self.seen if self.manifest.samples is None else np.arange(self.manifest.samples)

    @cached_property
    def seen(self) -> Int64[np.ndarray, " seen"]:
        """The samples that occurred in some batch, ascending."""
        per_step = [np.asarray(step.samples, dtype=np.int64) for step in self.log]
        return np.unique(np.concatenate(per_step))

    @cached_property
    def fed_may_depend_on_model(self) -> bool:
        """Whether some batch was given by `recorder.fed` and may depend on the model.

        Influence and retrainings hold what was fed constant.
        """
        return any(record.may_depend_on_model for step in self.log for record in step.fed)

    @property
    def has_ids(self) -> bool:
        """Whether samples are ids that batches carry, rather than row numbers."""
        return self.manifest.samples is None

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the states on disk, ascending."""
        # A process that was killed may have stored the state after a step whose log entry is
        # incomplete, and so is not part of the run.
        return tuple(number for number in self.store.states() if number <= self.steps)

    @cached_property
    def epochs(self) -> tuple[int, ...]:
        """Numbers of the states at the end of every epoch; the last is T."""
        ends: list[int] = []
        for state in range(1, self.steps):
            epoch_before = self.log[state - 1].fed[-1].epoch
            epoch_after = self.log[state].fed[-1].epoch
            if epoch_after != epoch_before:
                ends.append(state)
        return (*ends, self.steps)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that the optimizer holds."""
        return tuple(name for group in self.manifest.groups for name in group)

    @cached_property
    def moving_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that the training changed, other than BatchNorm's statistics."""
        known = set(self.task.batchnorm_statistics)
        candidates = [
            name
            for name, layout in self.manifest.buffers.items()
            if name not in known and layout.dtype.startswith(FLOATING)
        ]
        if not candidates:
            return ()
        first = self.state(self.kept[0])
        if len(self.kept) > 1:
            later = [self.state(number) for number in {self.kept[1], self.kept[-1]}]
        else:
            # Without the comparison with the recording: a task that fails it can be opened.
            transition = replace(self.transition(self.kept[0]), check=None)
            later = [transition.advance(first)]
        return tuple(
            name
            for name in candidates
            if any(not torch.equal(state.buffers[name], first.buffers[name]) for state in later)
        )

    def table(self) -> pl.DataFrame:
        """The step log as a table, one row per step.

        Columns that are lists run over the micro-batches of a step; `lr` runs over the parameter
        groups.
        """
        return journal.to_table(self.log)

    def step(self, index: int) -> Step:
        """The log entry of one step.

        Raises:
            NoSuchState: The run has no such step.
        """
        number = arguments.whole("index", index)
        if not 0 <= number < self.steps:
            raise NoSuchState(number, self.steps - 1, "step")
        return self.log[number]

    def batches(self, index: int) -> tuple[Batch, ...]:
        """The micro-batches of one step: as they were stored, or read again from the data set.

        Raises:
            NoSuchState: The run has no such step.
            DamagedFile: The stored batches are missing or changed.
            WrongData: A batch does not read as it was recorded.
        """
        fed = self.step(index).fed
        stored: tuple[Batch, ...] = (None,) * len(fed)
        if any(record.stored for record in fed):
            stored = self.store.batches(index, fed)
        batches: list[Batch] = []
        for place, (record, content) in enumerate(zip(fed, stored, strict=True)):
            batch = content if record.stored else self.task.batch(record.samples)
            # The store compares a file as a whole with its checksum.
            if not record.stored:
                _check_content(batch, record.digest, place=place, step=index)
            batches.append(batch)
        return tuple(batches)

    def rows(self, samples: Sequence[int]) -> Batch:
        """Rows of the data set, for a method that evaluates the task's loss on them.

        Raises:
            FedOfAnotherForm: The model was fed batches of another form, and the task's loss or
                predict cannot take rows as they are.
        """
        if self._row_problem:
            raise FedOfAnotherForm(self._row_problem)
        return self.task.batch(samples)

    @cached_property
    def _row_problem(self) -> str:
        """What the task's functions raise on rows of the data set; empty if nothing.

        Raises:
            BacktrailError: they say themselves what is wrong.
        """
        if self.has_ids:
            return ""
        for step in self.log:
            if any(record.stored for record in step.fed):
                break
        else:
            return ""
        fed = self.batches(step.index)[0]
        rows = self.task.batch(step.fed[0].samples)
        if _form_of(rows) == _form_of(fed):
            return ""
        state = self.state(0)
        try:
            with in_eval_mode(self.task):
                self.task.losses(state.params, state.buffers, cast(rows, None, self.task.device))
        except BacktrailError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def transition(self, index: int, dtype: Precision = None) -> Transition:
        """One step as a function from state to state.

        Args:
            index: Number of the step.
            dtype: Precision of the batches; None keeps the recorded one.

        Raises:
            NoSuchState: The run has no such step.
        """
        dtype = arguments.precision("dtype", dtype)
        step = self.step(index)
        manifest = self.manifest
        masks = (self._cancelled, self._zero_factor)
        update = Update(manifest.optimizer, manifest.groups, step.settings, *masks)
        batches = cast(self.batches(index), dtype, self.task.device)
        # In another precision the steps drift away from the recorded ones.
        check = RecordedStep(self, index) if dtype is None else None
        return Transition(self.task, update, step, batches, check)

    @exclusive
    def state(self, number: int, *, replay: bool = False, dtype: Precision = None) -> State:
        """One state, read from disk or replayed.

        Args:
            number: Number of the state, 0 … T.
            replay: Replay a state that is not on disk, from the nearest one before it.
            dtype: Precision of the tensors; None keeps the recorded one.

        Raises:
            NoSuchState: The run has no such state.
            MissingState: The state is not on disk, and `replay` is False.
        """
        number = arguments.whole("number", number)
        replay = arguments.flag("replay", replay)
        dtype = arguments.precision("dtype", dtype)
        if not 0 <= number <= self.steps:
            raise NoSuchState(number, self.steps, "state")
        if number not in self.kept and not replay:
            raise MissingState(number, self.kept)
        nearest = self.nearest_kept(number)
        state = self.store.state(nearest).cast(dtype, self.task.device)
        for index in range(nearest, number):
            state = self.transition(index, dtype).advance(state)
        return state

    def nearest_kept(self, number: int) -> int:
        """The last state on disk that is not after the given one; state 0 always is on disk."""
        place = bisect_right(self.kept, number) - 1
        return self.kept[place]

    def walk(self, first: int, last: int, dtype: Precision = None) -> Iterator[tuple[int, State]]:
        """Yield the states first … last with their numbers, in order.

        States on disk are read, which keeps replays from drifting; the others are replayed.

        Args:
            first: Number of the first state.
            last: Number of the last state.
            dtype: Precision of the tensors; None keeps the recorded one.

        Raises:
            NoSuchState: The run has no such state.
            BadSetting: The last state is before the first, or an argument is something else.
        """
        first = arguments.whole("first", first)
        last = arguments.whole("last", last)
        dtype = arguments.precision("dtype", dtype)
        for number in (first, last):
            if not 0 <= number <= self.steps:
                raise NoSuchState(number, self.steps, "state")
        if last < first:
            raise BadSetting("last", last, f"a state that is not before the first, {first}")
        # The generator begins later: wrong arguments are an error at the call.
        return self._states(first, last, dtype)

    @exclusive_steps
    def _states(self, first: int, last: int, dtype: Precision) -> Iterator[tuple[int, State]]:
        state = self.state(first, replay=True, dtype=dtype)
        yield first, state
        for number in range(first + 1, last + 1):
            if number in self.kept:
                state = self.state(number, dtype=dtype)
            else:
                state = self.transition(number - 1, dtype).advance(state)
            yield number, state

    @exclusive
    def check_steps(self, first: int = 0, last: int | None = None) -> None:
        """Replay the steps first … last - 1 that this object has not compared yet, and compare.

        Every method does so before it answers, for the steps that it does not compute itself: a
        task that does not reproduce the recorded steps (other labels, another loss, reduction or
        layer) has numbers that are not about this training.

        Args:
            first: The first step.
            last: The step after the last; None: the end.

        Raises:
            ReplayMismatch: A step differs from the recorded one; the message names the first one.
            WrongData: A batch does not read as it was recorded.
        """
        steps = (first, self.steps if last is None else last)
        first, stop = arguments.step_range("(first, last)", steps, self.steps)
        state = None
        for index in range(first, stop):
            if index in self.checked_steps:
                state = None
                continue
            if state is None or index in self.kept:
                state = self.state(index, replay=True)
            state = self.transition(index).advance(state)

    @exclusive
    def check_kept_steps(self) -> None:
        """Compare every sample, and the steps that start at states on disk (`MOST_KEPT` at most).

        For methods that read few states: replaying every step would cost more than they do.

        Raises:
            ReplayMismatch: A step differs from the recorded one; the message names the first one.
            WrongData: A batch does not read as it was recorded.
        """
        self._check_samples()
        starts = [number for number in self.kept if number < self.steps]
        places = np.linspace(0, len(starts) - 1, min(len(starts), MOST_KEPT)).round().astype(int)
        for place in dict.fromkeys(places.tolist()):
            number = starts[place]
            if number not in self.checked_steps:
                transition = self.transition(number)
                raw = transition.raw_gradient(self.state(number))
                RecordedStep(self, number).check_gradient(transition.clip(raw.gradient))

    def find_cancelled(self) -> None:
        """Find entries whose first gradient is zero, and would not be after a change.

        Gradients of samples may cancel each other, or a factor may be zero. Derivatives of later
        transitions need to know it: the second moment of such an entry is zero, and at a later step
        it is zero only where it was at the first one that updates the parameter. Takes three
        gradients at each such step, once for a run that was opened; nearly always that is step 0.

        Raises:
            BacktrailError: the task is wrong.
            RuntimeError: the model fails.
        """
        has_second_moments = rule_named(self.manifest.optimizer).second_moments
        if "zero gradients" not in self._derivatives and has_second_moments:
            seen: set[str] = set()
            trained = {name for group in self.manifest.groups for name in group}
            for step in self.log:
                new = trained.difference(seen, step.unused)
                if new:
                    self._note_zero_gradients(step.index, new)
                seen |= new
        # Last, so that what was interrupted is done again.
        self._derivatives["zero gradients"] = "told apart"

    def _note_zero_gradients(self, index: int, names: set[str]) -> None:
        """Note the entries of some parameters whose gradient at a step is zero by chance.

        Raises:
            BacktrailError: the task is wrong.
        """
        state = self.state(index, replay=True)
        recorded = self.transition(index).raw_gradient(state).gradient
        if all(bool(recorded[name].all()) for name in names):
            return
        # With other weights or parameters, what only happens to be zero is zero no more. In
        # float64, so that what is zero but for rounding (a bias before BatchNorm) stays zero.
        try:
            weighted, moved = self._gradients_elsewhere(index, state)
        except BacktrailError:
            raise
        except (RuntimeError, TypeError, ValueError):
            return  # float64 cannot compute it, and the check of the derivatives says so
        for other, masks in ((weighted, self._cancelled), (moved, self._zero_factor)):
            sizes = [float(tensor.abs().max()) for tensor in other.values() if tensor.numel()]
            for name in names:
                mask = (recorded[name] == 0) & (other[name].abs() > ROUNDING * max(sizes))
                if bool(mask.any()):
                    masks[name] = mask

    def _gradients_elsewhere(self, index: int, state: State) -> tuple[Tree, Tree]:
        """Gradients of a step with other weights of its slots, and at other parameters."""
        transition = self.transition(index, torch.float64)
        state = state.cast(torch.float64, self.task.device)
        generator = torch.Generator().manual_seed(0)
        like = next(iter(state.params.values()))
        weights = 0.5 + torch.rand(sum(transition.slot_counts), generator=generator)
        weighted = transition.raw_gradient(state, weights=weights.to(like), autocast=False)
        means = {name: float(state.params[name].abs().mean()) for name in transition.updated}
        params = dict(state.params)
        for name in transition.updated:
            # A parameter that is zero takes the size of the others.
            size = MOVE * means[name] or MOVE * max(means.values())
            change = torch.randn(params[name].shape, generator=generator).to(like)
            params[name] = params[name] + size * change
        elsewhere = State(params, state.buffers, state.moments)
        moved = transition.raw_gradient(elsewhere, autocast=False)
        return weighted.gradient, moved.gradient

    @cached_property
    def _cancelled(self) -> Tree:
        return {}

    @cached_property
    def _zero_factor(self) -> Tree:
        return {}

    @property
    def derivatives(self) -> str | None:
        """What the check of its derivatives found; None before it was made."""
        return self._derivatives.get("found")

    def note_derivatives(self, found: str) -> None:
        """Note what the check of its derivatives found."""
        self._derivatives["found"] = found

    @property
    def asymmetric(self) -> str:
        """Why the gradient is not the derivative of the loss; empty if it is."""
        return self._derivatives.get("asymmetric", "")

    def note_asymmetric(self, why: str) -> None:
        """Note why the gradient is not the derivative of the loss."""
        self._derivatives["asymmetric"] = why

    @property
    def are_differences_checked(self) -> bool:
        """Whether products by differences were checked at more than one state."""
        return "differences" in self._derivatives

    def note_differences_checked(self) -> None:
        """Note that products by differences were checked at more than one state."""
        self._derivatives["differences"] = "checked"

    @cached_property
    def _derivatives(self) -> dict[str, str]:
        return {}

    def _check_samples(self) -> None:
        """Compare what every sample reads, at its first visit, with what was recorded.

        Raises:
            WrongData: a batch does not read as it was recorded.
        """
        new = set(self.seen.tolist()) - self.checked_samples
        for index, step in enumerate(self.log):
            if not new:
                return
            if new.intersection(step.samples):
                self.batches(index)
                new.difference_update(step.samples)
                self.checked_samples.update(step.samples)

    @cached_property
    def checked_samples(self) -> set[int]:
        """Samples whose content was compared with the recording."""
        return set()

    @cached_property
    def checked_steps(self) -> set[int]:
        """Steps whose gradient was compared with the recorded one."""
        return set()

    @cached_property
    def largest_gradient(self) -> float:
        """The largest norm of a gradient that the optimizer consumed."""
        return max(step.norm for step in self.log)

    @exclusive
    def verify(self, *, tolerance: float | None = None) -> "Verification":
        """Replay the whole run and compare it with what was recorded.

        Compared are the content of every batch, the norm of every gradient, and the state at the
        end of every segment: parameters, buffers, and the optimizer's tensors. A segment is a range
        of steps between two states on disk.

        Args:
            tolerance: Relative difference allowed in a segment of up to 50 steps (more in
                proportion for longer ones); by default that of `open_run`, or else 1e-9 in float64,
                5e-2 for a training under autocast, else 1e-4.

        Raises:
            ReplayMismatch: A step differs, or a segment does not end in the recorded state; the
                message names the first such step.
            WrongData: A batch does not read as it was recorded.
        """
        tolerance = arguments.tolerance("tolerance", tolerance)
        ends = (*self.kept[1:], self.steps)
        # The last segment is empty where the final state is on disk.
        segments = [(start, stop) for start, stop in zip(self.kept, ends, strict=True)]
        count = sum(stop > start for start, stop in segments)
        found = Verification(steps=self.steps, segments=count, difference=0.0)
        total = self.steps - self.kept[0]
        with tqdm(total=total, desc="replaying", unit="step", disable=None, leave=False) as bar:
            for start, stop in segments:
                found = self._verify_segment(start, stop, tolerance=tolerance, found=found, bar=bar)
        return found

    def _verify_segment(
        self,
        start: int,
        stop: int,
        *,
        tolerance: float | None,
        found: "Verification",
        bar: "tqdm[object]",
    ) -> "Verification":
        """Replay one segment, and return what was found so far, including it.

        Raises:
            ReplayMismatch: the segment does not end in the recorded state.
        """
        state = self.state(start)
        autocast = any(step.autocast for step in self.log[start:stop])
        chosen = tolerance or self.tolerance
        per_tolerance_steps = chosen or default_replay_tolerance(state, autocast=autocast)
        allowed = per_tolerance_steps * max(1.0, (stop - start) / TOLERANCE_STEPS)
        for index in range(start, stop):
            gap = self._autocast_gap(index, state)
            found = found.with_step(autocast=self.step(index).autocast, gap=gap)
            state = self._verify_step(index, state, allowed)
            bar.update()
        if stop not in self.kept:
            return found
        off = relative_difference(state, self.state(stop))
        # Written as `not <=`, so that NaN fails too.
        if not off <= allowed:
            what = f"the state after it (replayed from state {start})"
            raise ReplayMismatch(stop - 1, what, (off, allowed))
        self.check_moments(stop, state.moments, MOMENTS * allowed)
        return replace(found, difference=max(found.difference, off))

    def check_moments(self, number: int, found: dict[str, Tree], allowed: float) -> None:
        """Compare the optimizer's replayed tensors with those of a recorded state.

        Raises:
            ReplayMismatch: they differ; the message names the optimizer's key.
        """
        recorded = self.state(number).moments
        for key, off in moment_differences(found, recorded).items():
            # Step counts are whole numbers, which every device counts alike.
            tolerance = 0.0 if key == "step" else allowed
            if not off <= tolerance:
                what = f"the optimizer's {key!r} after it (reset or loaded while training?)"
                raise ReplayMismatch(number - 1, what, (off, tolerance))

    def _autocast_gap(self, index: int, state: State) -> float:
        """Relative difference between a step's gradient under autocast and without it.

        The training followed the first; influence is a derivative of the second.
        """
        if not self.step(index).autocast:
            return 0.0
        transition = self.transition(index)
        trained, _, _ = transition.raw_gradient(state, autocast=True)
        full, _, _ = transition.raw_gradient(state, autocast=False)
        gap = norm({name: full[name] - trained[name] for name in full})
        return gap / max(norm(full), TINY)

    def _verify_step(self, index: int, state: State, allowed: float) -> State:
        """Compare one step with its log entry, and return the state after it.

        Raises:
            WrongData: a batch does not read as it was recorded.
            ReplayMismatch: the norm of the gradient differs.
        """
        step = self.step(index)
        for place, (record, batch) in enumerate(zip(step.fed, self.batches(index), strict=True)):
            _check_content(batch, record.digest, place=place, step=index)
        transition = self.transition(index)
        raw_gradient, buffers, _ = transition.raw_gradient(state)
        consumed = transition.clip(raw_gradient)
        off = abs(norm(consumed) - step.norm) / max(step.norm, TINY)
        if not off <= allowed:
            raise ReplayMismatch(index, "the norm of its gradient", (off, allowed))
        return transition.apply_update(state, consumed, buffers)

    def __repr__(self) -> str:
        """One line: path, steps, optimizer, samples and stored states."""
        end = "" if self.manifest.finished else ", stopped before its end"
        return (
            f"Run({str(self.path)!r}: {self.steps} steps of {self.manifest.optimizer} on "
            f"{self.samples} samples, {len(self.kept)} states kept{end})"
        )


def _check_content(batch: Batch, recorded: str, *, place: int, step: int) -> None:
    """Compare what a batch contains with its recorded digest.

    Raises:
        WrongData: it differs.
    """
    found = digest(batch)
    if found != recorded:
        raise WrongData(f"batch {place} of step {step} reads {found}, and was {recorded}")


def _form_of(batch: Batch) -> object:
    """Nesting of a batch, and type and number of axes of every tensor in it."""
    leaves, structure = tree_flatten(batch)
    kinds = [
        (leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    ]
    return structure, kinds


@final
@dataclass(frozen=True, slots=True)
class RecordedStep(StepCheck):
    """Compares one step of a run, whenever it is computed again, with its recording.

    Attributes:
        run: the run.
        index: number of the step.
    """

    run: Run
    index: int

    @property
    def state_is_known(self) -> bool:
        """Whether the state after the step is on disk."""
        return self.index + 1 in self.run.kept

    def check_gradient(self, consumed: Tree) -> None:
        """Compare the norm of the gradient.

        Raises:
            ReplayMismatch: it differs from the recorded one.
        """
        recorded = self.run.step(self.index).norm
        scale = max(recorded, SMALL_GRADIENT * self.run.largest_gradient, TINY)
        off = abs(norm(consumed) - recorded) / scale
        allowed = self._tolerance(consumed)
        if not off <= allowed:
            raise ReplayMismatch(self.index, "the norm of its gradient", (off, allowed))
        self.run.checked_steps.add(self.index)

    def check_state(self, after: State) -> None:
        """Compare the state after the step with the one on disk.

        Raises:
            ReplayMismatch: it differs from the recorded one.
        """
        recorded = self.run.state(self.index + 1)
        off = relative_difference(after, recorded)
        allowed = self._tolerance(after.params)
        if not off <= allowed:
            raise ReplayMismatch(self.index, "the state after it", (off, allowed))
        self.run.check_moments(self.index + 1, after.moments, MOMENTS * allowed)

    def _tolerance(self, tensors: Tree) -> float:
        """Allowed relative difference; it grows with the steps since the last state on disk."""
        allowed = self.run.tolerance
        if allowed is None:
            autocast = bool(self.run.step(self.index).autocast)
            own_kernels = default_replay_tolerance(State(tensors), autocast=autocast)
            allowed = own_kernels if autocast else OTHER_KERNELS * own_kernels
        replayed = self.index + 1 - self.run.nearest_kept(self.index)
        return allowed * max(1.0, replayed / TOLERANCE_STEPS)


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

    def with_step(self, *, autocast: str, gap: float) -> "Verification":
        """Return the result with one more step.

        Args:
            autocast: The precision that the step was under; empty without autocast.
            gap: Relative difference of the step's gradient under autocast.
        """
        return replace(self, autocast=autocast or self.autocast, gap=max(self.gap, gap))

    def __str__(self) -> str:
        """Return the result in one sentence, or two for a training under autocast."""
        replayed = (
            f"{self.steps} steps replayed in {self.segments} segments; "
            f"largest relative difference {self.difference:.1e}"
        )
        if not self.autocast:
            return replayed
        if not self.gap:
            return (
                f"{replayed}. Trained under autocast {self.autocast}; "
                "replayed and attributed without it"
            )
        return (
            f"{replayed}. Trained and replayed under autocast {self.autocast}; influence is "
            f"computed without it, where gradients differ by up to {self.gap:.1e}"
        )


def open_run(path: str | Path, task: Task, *, tolerance: float | None = None) -> Run:
    """Open a recorded run.

    A run whose process was killed can be opened as well: it ends at its last completed step.

    Example::

        run = backtrail.open_run("runs/digits", task)
        run.verify()
        state = run.state(100, replay=True)

    Args:
        path: Folder of the run.
        task: Model, data and loss of the training. The weights of its model are not read.
        tolerance: Relative difference from the recording that replayed gradients and states may
            have, for a task that computes the same on another device or with other kernels. None
            for the default: 1e-8 in float64, 5e-2 for a training under autocast, else 1e-3.

    Raises:
        BadSetting: An argument has an invalid value.
        NotARun: The folder holds no run.
        WrongFormat: The run was written by a version of backtrail with another layout.
        EmptyRun: No step was completed.
        WrongModel: The task's model has other tensors than the recorded one.
        WrongData: The task's data set has another length or other rows.
        DamagedFile: A file is missing or changed; the message names it.
    """
    tolerance = arguments.tolerance("tolerance", tolerance)
    folder = arguments.path("path", path)
    arguments.instance("task", task, Task, "a backtrail.Task")
    store = Store(folder, read_manifest(folder))
    check_model(store.manifest, task)
    run = Run(store, task, tuple(store.log()), tolerance)
    if not run.log:
        raise EmptyRun(folder)
    if 0 not in run.kept:
        raise DamagedFile(folder / MANIFEST_NAME, "it does not name state 0")
    check_data(store.manifest, task, run.log[0])
    task.binding.moving.update(run.moving_buffers)
    return run


def default_replay_tolerance(state: State, *, autocast: bool = False) -> float:
    """Allowed relative difference after 50 replayed steps, by precision.

    Other kernels than the training's round differently, and much more coarsely under autocast.
    """
    if all(tensor.dtype == torch.float64 for tensor in state.params.values()):
        return 1e-9
    return AUTOCAST if autocast else 1e-4


def relative_difference(left: State, right: State) -> float:
    """Norm of the difference of all parameters and buffers, relative to the norm of `right`."""
    # In float64, where the sum over all entries rounds less than the replay.
    left_tensors = left.params | left.buffers
    right_tensors = {name: t.double() for name, t in (right.params | right.buffers).items()}
    gaps = {name: tensor.double() - right_tensors[name] for name, tensor in left_tensors.items()}
    return norm(gaps) / max(norm(right_tensors), TINY)


def moment_differences(left: dict[str, Tree], right: dict[str, Tree]) -> dict[str, float]:
    """Relative difference of the optimizer's tensors, by the optimizer's own key.

    Each key is compared by itself: second moments are much smaller than first ones. Infinite where
    one side has a tensor that the other lacks.
    """
    left_by_key = _by_key(left)
    right_by_key = _by_key(right)
    differences: dict[str, float] = {}
    for key in dict.fromkeys([*left_by_key, *right_by_key]):
        found = left_by_key.get(key, {})
        wanted = right_by_key.get(key, {})
        if found.keys() != wanted.keys():
            differences[key] = math.inf
            continue
        gaps = {name: tensor - wanted[name].to(tensor.device) for name, tensor in found.items()}
        differences[key] = norm(gaps) / max(norm(wanted), TINY) if norm(gaps) else 0.0
    return differences


def _by_key(moments: dict[str, Tree]) -> dict[str, Tree]:
    """The tensors by the optimizer's key and by parameter, in float64."""
    found: dict[str, Tree] = {}
    for name, tensors in moments.items():
        for key, tensor in tensors.items():
            found.setdefault(key, {})[name] = tensor.double()
    return found
