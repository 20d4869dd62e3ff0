"""A recorded training, run again with other weights of its samples; its states are on disk."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float64
from tqdm.auto import tqdm

from backtrail.run.files import replacing
from backtrail.run.run import Run
from backtrail.run.tensors import pack_state, unpack_state
from backtrail.step.state import State
from backtrail.step.step import Transition
from backtrail.task.task import Task


@final
@dataclass(frozen=True, slots=True)
class Rerun:
    """The recorded steps again, from the recorded first state, with every sample's own weight.

    Batches, random numbers and hyperparameters are the recorded ones, and so is the precision. A
    `backtrail.sweep.trajectory.Trajectory`, along which a sweep can go.

    Attributes:
        run: the recorded training.
        weights: of the samples, in the order of `run.ids`.
        folder: of the states; those that it holds already are not computed again.
    """

    run: Run
    weights: Float64[np.ndarray, " sample"]
    folder: Path

    @property
    def task(self) -> Task:
        """Model, data and loss."""
        return self.run.task

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.run.steps

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that the optimizer holds."""
        return self.run.trained

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the states on disk: those of the recorded run, and the last one."""
        return tuple(sorted({*self.run.kept, self.steps}))

    def train(self) -> None:
        """Compute the states that are to be on disk and are not yet."""
        done = 0
        for number in self.kept[1:]:
            if self._file(number).is_file():
                done = number
        state = self.state(done)
        steps = range(done, self.steps)
        for index in tqdm(steps, desc="re-running", unit="step", disable=None, leave=False):
            state = self.transition(index).advance(state)
            if index + 1 in self.kept:
                self._keep(index + 1, state)
                # Read back, so that a re-run that is resumed goes on from the same tensors,
                # strides included.
                state = self.state(index + 1)

    def state(self, number: int, *, replay: bool = False) -> State:
        """One state, read or replayed from the nearest one before it.

        Args:
            number: of the state.
            replay: taken for granted.
        """
        del replay
        nearest = max(kept for kept in self.kept if kept <= number)
        state = self._read(nearest)
        for index in range(nearest, number):
            state = self.transition(index).advance(state)
        return state

    def transition(self, index: int) -> Transition:
        """One step, with the weights of this re-run."""
        recorded = self.run.transition(index)
        places = np.searchsorted(self.run.ids, recorded.step.samples)
        weights = torch.from_numpy(self.weights[places])
        # Nothing recorded is to be met with other weights.
        return replace(recorded, check=None, slot_weights=weights)

    def walk(self, first: int, last: int) -> Iterator[tuple[int, State]]:
        """Yield the states first ... last with their numbers, in order."""
        state = self.state(first)
        yield first, state
        for number in range(first + 1, last + 1):
            if number in self.kept:
                state = self.state(number)
            else:
                state = self.transition(number - 1).advance(state)
            yield number, state

    def _read(self, number: int) -> State:
        if number == 0:
            # Before all steps, and so before all weights.
            return self.run.state(0)
        return unpack_state(self._file(number).read_bytes()).cast(None, self.task.device)

    def _keep(self, number: int, state: State) -> None:
        with replacing(self._file(number)) as scratch:
            scratch.write_bytes(pack_state(state.cast(None, "cpu")))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"
