"""Checkpoints of a training that was never recorded: what Diff-In needs, and no more."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from backtrail.errors import BadCheckpoint, DamagedFile, NoCheckpoints
from backtrail.methods.diff_in.finite_differences import precise
from backtrail.methods.diff_in.trajectory import Point, Trajectory
from backtrail.task.task import Task
from backtrail.task.torch_compile import parameters, plain
from backtrail.tree import Tree, cast

Given = tuple[int, Mapping[str, Any] | str | Path, float]
ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
WRAPPED = "module."  # as DistributedDataParallel names what it wraps
NESTED = ("state_dict", "model_state_dict", "model")


@final
@dataclass(frozen=True)
class Checkpoints:
    r"""States that a training left behind: each with its number t, the updates before it, and the rate η_t.

    >>> model = torch.nn.Linear(2, 1)
    >>> data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4, 1))
    >>> task = Task(model, data, loss=lambda outputs, batch: (outputs - batch[1]).square().mean(1))
    >>> Checkpoints(task, [(10, model.state_dict(), 0.1)], steps=10)
    Checkpoints(1 of a training of 10 steps on 4 samples: 10)

    Args:
        task: model, data and loss; every row of its data is taken to have been trained on, all
            equally often.
        source: `(step, state_dict, lr)` for each, a file in place of the state_dict if you like; or
            a folder of files (`.pt`, `.pth`, `.bin`, `.safetensors`), each with its step as the
            last number in its name. Files are read with `weights_only=True`: no code in them is
            run.
        steps: T, how many updates the training made.
        lr: for a folder, the rate: one number, or one for every step that a file is of. Give the
            rate that the update from the checkpoint used, not what a scheduler had set after the
            last.

    Raises:
        NoCheckpoints: there are none, or not with what is needed to use them.
        BadCheckpoint: one is not of this model or training; the message names it and what differs.
        DamagedFile: one cannot be read.
    """

    task: Task
    source: str | Path | Sequence[Given]
    steps: int
    lr: float | Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        """Read them once, so that what is wrong is told now.

        Raises:
            BadCheckpoint: one is of a step that the training does not have.
        """
        for step in self.states:
            if not 0 <= step <= self.steps:
                raise BadCheckpoint(
                    f"step {step}", f"the training has the states 0 to {self.steps}"
                )

    @cached_property
    def given(self) -> dict[int, tuple[Mapping[str, Any] | Path, float]]:
        """What is at hand, by step.

        Raises:
            NoCheckpoints: nothing, or not with what is needed to use it.
        """
        found = self._in_folder() if isinstance(self.source, (str, Path)) else list(self.source)
        if not found:
            raise NoCheckpoints("the list is empty")
        return {
            int(step): (Path(content) if isinstance(content, (str, Path)) else content, float(rate))
            for step, content, rate in sorted(found, key=lambda one: one[0])
        }

    @property
    def states(self) -> tuple[int, ...]:
        """Their numbers, in order."""
        return tuple(self.given)

    def trajectory(self, checkpoints: int | Sequence[int]) -> Trajectory:
        """Look at so many of them, evenly over the training, or at given ones; state 0 is left out.

        Raises:
            NoCheckpoints: none is left.
        """
        later = [state for state in self.states if state > 0]
        if not later:
            raise NoCheckpoints("the only one is of step 0, before any update")
        if isinstance(checkpoints, int):
            wanted = [self.steps * part / checkpoints for part in range(1, checkpoints + 1)]
            states = sorted(
                {min(later, key=lambda state: (abs(state - aim), state)) for aim in wanted}
            )
        else:
            states = sorted(set(checkpoints))
        points = tuple(self.point(state) for state in states)
        end = points[-1] if states[-1] == later[-1] else self.point(later[-1])
        return Trajectory(
            self.task, self.steps, points, end, np.arange(len(self.task.data)), lambda _: end
        )

    def point(self, state: int) -> Point:
        """One of them, read.

        Raises:
            BadCheckpoint: it is not there, or not of this model.
        """
        if state not in self.given:
            raise BadCheckpoint(
                f"step {state}", f"there are checkpoints of the steps {list(self.states)}"
            )
        content, rate = self.given[state]
        tensors = tensors_of(content)
        place = str(content) if isinstance(content, Path) else f"the checkpoint of step {state}"
        params = matched(place, tensors, self.task.parameters(), needed="parameter")
        buffers = matched(place, tensors, self.task.buffers(), needed="")
        moving = [
            name for name, tensor in parameters(self.task.model).items() if tensor.requires_grad
        ]
        return Point(state, precise(params), precise(buffers), dict.fromkeys(moving, rate))

    def _in_folder(self) -> list[Given]:
        folder = Path(str(self.source))
        files = [file for file in sorted(folder.glob("*")) if file.suffix in ENDINGS]
        if not files:
            raise NoCheckpoints(f"{folder} holds no file that ends with {', '.join(ENDINGS)}")
        found: list[Given] = []
        for file in files:
            numbers = re.findall(r"\d+", file.stem)
            if not numbers:
                raise NoCheckpoints(f"{file} has no step number in its name")
            found.append((int(numbers[-1]), file, self._rate(int(numbers[-1]))))
        return found

    def _rate(self, step: int) -> float:
        rate = self.lr.get(step) if isinstance(self.lr, Mapping) else self.lr
        if rate is None:
            raise NoCheckpoints(
                f"no learning rate is given for step {step}; give lr=, a number or one for every step"
            )
        return rate

    def __repr__(self) -> str:
        """One line: how many, of what."""
        numbers = ", ".join(map(str, self.states))
        return (
            f"Checkpoints({len(self.states)} of a training of {self.steps} steps on {len(self.task.data)} samples: "
            f"{numbers})"
        )


def tensors_of(content: Mapping[str, Any] | Path) -> Tree:
    """The tensors of a model's state, from memory or a file, under their plain names."""
    held = _loaded(content) if isinstance(content, Path) else content
    nested = next((held[key] for key in NESTED if isinstance(held.get(key), Mapping)), held)
    found = {
        plain(name): tensor.detach()
        for name, tensor in nested.items()
        if isinstance(tensor, Tensor)
    }
    wrapped = found and all(name.startswith(WRAPPED) for name in found)
    return (
        {name.removeprefix(WRAPPED): tensor for name, tensor in found.items()} if wrapped else found
    )


def _loaded(file: Path) -> Mapping[str, Any]:
    """What is in a file, without running code in it.

    Raises:
        DamagedFile: it cannot be read.
    """
    try:
        safe = file.suffix == ".safetensors"
        found: Mapping[str, Any] = (
            load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise DamagedFile(file, str(error)) from error
    return found


def matched(place: str, found: Tree, wanted: Tree, *, needed: str) -> Tree:
    """Every wanted tensor, in the model's precision and on its device; buffers that were not saved are the model's.

    Raises:
        BadCheckpoint: names the tensor that is not there, or has another shape.
    """
    for name, like in wanted.items():
        if needed and name not in found:
            raise BadCheckpoint(place, f"it has no {needed} {name!r}; it has {sorted(found)[:6]}")
        if name in found and found[name].shape != like.shape:
            raise BadCheckpoint(
                place,
                f"{name!r} has shape {list(found[name].shape)}, the model's {list(like.shape)}",
            )
    return {
        name: cast(found[name], like.dtype, like.device) if name in found else like
        for name, like in wanted.items()
    }
