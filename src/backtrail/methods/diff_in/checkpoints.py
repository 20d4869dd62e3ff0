"""Checkpoints of a training that was not recorded: all that Diff-In needs of one."""

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

from backtrail import arguments
from backtrail.errors import BadCheckpoint, BadSetting, DamagedFile, NoCheckpoints, UnreadableData
from backtrail.methods.diff_in.finite_differences import at_least_float32
from backtrail.methods.diff_in.trajectory import Point, Trajectory
from backtrail.task.task import Rows, Task
from backtrail.task.torch_compile import parameters, plain
from backtrail.tree import Tree, cast

# (step, state_dict or file, learning rate)
Entry = tuple[int, Mapping[str, Any] | str | Path, float]
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
SOURCES = "(step, state_dict or file, learning rate) for each checkpoint, or a folder"
# Prefix of the names inside DistributedDataParallel.
WRAPPER_PREFIX = "module."
# Keys under which common training loops keep the model's state_dict.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")


@final
@dataclass(frozen=True)
class Checkpoints:
    r"""States that a training left behind, each with its number t and the learning rate η_t.

    The number of a state is how many updates were made before it.

    >>> model = torch.nn.Linear(2, 1)
    >>> data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4, 1))
    >>> task = Task(model, data, loss=lambda outputs, batch: (outputs - batch[1]).square().mean(1))
    >>> Checkpoints(task, [(10, model.state_dict(), 0.1)], steps=10)
    Checkpoints(1 of a training of 10 steps on 4 samples: 10)

    Args:
        task: Model, data and loss. Every row of its data counts as trained on, all equally often.
        source: `(step, state_dict, lr)` for each checkpoint, where a file may stand in place of the
            state_dict; or a folder of files (`.pt`, `.pth`, `.bin`, `.safetensors`), each with its
            step as the last number in its name. Files are read with `weights_only=True`: no code
            in them is run.
        steps: T, how many updates the training made.
        lr: For a folder, the learning rate: one number, or one for the step of every file. Give the
            rate that the update from the checkpoint used, not the one that a scheduler set after
            the last update.

    Raises:
        NoCheckpoints: There are none, or a learning rate or step is missing.
        BadCheckpoint: One does not fit the model or the training; the message names it.
        DamagedFile: A file cannot be read.
    """

    task: Task
    source: str | Path | Sequence[Entry]
    steps: int
    lr: float | Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        """Read the list of checkpoints once, so that mistakes are reported now.

        Raises:
            BadCheckpoint: One has a step that the training does not have.
            UnreadableData: The task's data set cannot be read by row number.
        """
        arguments.instance("task", self.task, Task, "a backtrail.Task")
        if not isinstance(self.task.data, Rows):
            raise UnreadableData(type(self.task.data).__name__)
        steps = arguments.whole("steps", self.steps, least=1)
        object.__setattr__(self, "steps", steps)  # the dataclass is frozen
        for step in self.states:
            if not 0 <= step <= self.steps:
                problem = f"the training has the states 0 to {self.steps}"
                raise BadCheckpoint(f"step {step}", problem)

    @cached_property
    def entries(self) -> dict[int, tuple[Mapping[str, Any] | Path, float]]:
        """Content (or file) and learning rate of every checkpoint, by step, ascending.

        Raises:
            NoCheckpoints: There are none, or a learning rate or step is missing.
        """
        if isinstance(self.source, (str, Path)):
            entries = self._entries_of_folder()
        else:
            entries = [_entry(given) for given in arguments.items("source", self.source, SOURCES)]
        if not entries:
            raise NoCheckpoints("the list is empty")
        by_step: dict[int, tuple[Mapping[str, Any] | Path, float]] = {}
        for step, content, rate in sorted(entries, key=lambda entry: entry[0]):
            if step in by_step:
                raise NoCheckpoints(f"there are two of step {step}")
            read = Path(content) if isinstance(content, (str, Path)) else content
            by_step[step] = (read, rate)
        return by_step

    @property
    def states(self) -> tuple[int, ...]:
        """Numbers of the states, ascending."""
        return tuple(self.entries)

    def trajectory(self, checkpoints: int | Sequence[int]) -> Trajectory:
        """Choose so many states, evenly over the training, or given ones; state 0 is left out.

        Raises:
            NoCheckpoints: None is left.
        """
        trained = [state for state in self.states if state > 0]
        if not trained:
            raise NoCheckpoints("the only one is of step 0, before any update")
        if isinstance(checkpoints, int):
            # As many targets as steps already choose every state.
            count = min(checkpoints, max(self.steps, 1))
            targets = [self.steps * part / count for part in range(1, count + 1)]
            states = sorted({_nearest(trained, target) for target in targets})
        else:
            states = sorted(set(checkpoints))
        points = tuple(self.point(state) for state in states)
        end = points[-1] if states[-1] == trained[-1] else self.point(trained[-1])
        return Trajectory(
            task=self.task,
            steps=self.steps,
            points=points,
            end=end,
            samples=np.arange(len(self.task.data)),
            look=lambda _: end,
        )

    def point(self, state: int) -> Point:
        """Read one state.

        Raises:
            BadCheckpoint: It is not there, or not of this model.
        """
        if state not in self.entries:
            problem = f"there are checkpoints of the steps {list(self.states)}"
            raise BadCheckpoint(f"step {state}", problem)
        content, rate = self.entries[state]
        tensors = tensors_of(content)
        place = str(content) if isinstance(content, Path) else f"the checkpoint of step {state}"
        params = matched(place, tensors, self.task.parameters(), required=True)
        buffers = matched(place, tensors, self.task.buffers(), required=False)
        trained = [
            name for name, tensor in parameters(self.task.model).items() if tensor.requires_grad
        ]
        return Point(
            state=state,
            params=at_least_float32(params),
            buffers=at_least_float32(buffers),
            rates=dict.fromkeys(trained, rate),
        )

    def _entries_of_folder(self) -> list[Entry]:
        folder = arguments.path("source", self.source)
        files = [file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES]
        if not files:
            raise NoCheckpoints(f"{folder} holds no file that ends with {', '.join(SUFFIXES)}")
        entries: list[Entry] = []
        for file in files:
            numbers = re.findall(r"\d+", file.stem)
            if not numbers:
                raise NoCheckpoints(f"{file} has no step number in its name")
            step = int(numbers[-1])
            entries.append((step, file, self._rate(step)))
        return entries

    def _rate(self, step: int) -> float:
        rate = self.lr.get(step) if isinstance(self.lr, Mapping) else self.lr
        if rate is None:
            raise NoCheckpoints(
                f"no learning rate is given for step {step}; "
                "give lr=, a number or one for every step"
            )
        return _rate(rate)

    def __repr__(self) -> str:
        """One line: how many, of what."""
        numbers = ", ".join(map(str, self.states))
        training = f"a training of {self.steps} steps on {len(self.task.data)} samples"
        return f"Checkpoints({len(self.states)} of {training}: {numbers})"


def _entry(given: object) -> Entry:
    """One checkpoint of a list.

    Raises:
        BadSetting: It is something else.
    """
    parts = arguments.items("source", given, SOURCES)
    if len(parts) != 3:
        raise BadSetting("source", given, SOURCES)
    step, content, rate = parts
    if not isinstance(content, (str, Path, Mapping)):
        raise BadSetting("source", given, SOURCES)
    number = arguments.whole("step", step, least=0)
    return number, content, _rate(rate)


def _rate(rate: object) -> float:
    return arguments.real("lr", rate, "a learning rate of at least 0", lambda lr: lr >= 0)


def _nearest(states: Sequence[int], target: float) -> int:
    """The state nearest to a target; of two equally near ones, the earlier."""
    return min(states, key=lambda state: (abs(state - target), state))


def tensors_of(content: Mapping[str, Any] | Path) -> Tree:
    """The tensors of a model's state_dict, from memory or a file, without wrappers in their names.

    torch.compile and DistributedDataParallel put prefixes before names; training loops keep the
    state_dict under a key beside the optimizer's.
    """
    saved = _read(content) if isinstance(content, Path) else content
    for key in NESTED_KEYS:
        if isinstance(saved.get(key), Mapping):
            saved = saved[key]
            break
    tensors = {}
    for name, tensor in saved.items():
        if isinstance(tensor, Tensor):
            tensors[plain(name)] = tensor.detach()
    is_wrapped = bool(tensors) and all(name.startswith(WRAPPER_PREFIX) for name in tensors)
    if not is_wrapped:
        return tensors
    return {name.removeprefix(WRAPPER_PREFIX): tensor for name, tensor in tensors.items()}


def _read(file: Path) -> Mapping[str, Any]:
    """Read a file without running code in it.

    Raises:
        DamagedFile: It cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            content: Mapping[str, Any] = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedFile(file, str(error)) from error
    return content


def matched(place: str, tensors: Tree, like: Tree, *, required: bool) -> Tree:
    """The tensors of a checkpoint under the model's names, in its precision and on its device.

    Args:
        place: Where the checkpoint is from, for error messages.
        tensors: What it holds.
        like: The model's own tensors.
        required: Whether each must be there. Buffers that were not saved are the model's own.

    Raises:
        BadCheckpoint: A tensor is missing or has another shape; the message names it.
    """
    result = {}
    for name, own in like.items():
        if name in tensors:
            given = tensors[name]
            if given.shape != own.shape:
                shapes = f"{name!r} has shape {list(given.shape)}, the model's {list(own.shape)}"
                raise BadCheckpoint(place, shapes)
            result[name] = cast(given, own.dtype, own.device)
        elif required:
            some = sorted(tensors)[:6]
            raise BadCheckpoint(place, f"it has no parameter {name!r}; it has {some}")
        else:
            result[name] = own
    return result
