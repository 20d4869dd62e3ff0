"""How much memory a sweep takes, and how it is cut to fit a budget."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from whence.errors import TooLittleMemory
from whence.influence import layout
from whence.replay.state import State, elementwise
from whence.run.run import Run
from whence.tree import each

CACHE = 160 * 2**20  # bytes of activations up to which more queries at once are faster on a processor


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """How a sweep is cut.

    Attributes:
        held: states in memory at once.
        chunk: queries pulled at once.
        state: bytes of one state.
        cotangent: bytes of one query's cotangent.
        activations: bytes that the forward pass of the largest micro-batch keeps for its backward pass.
    """

    held: int
    chunk: int
    state: int
    cotangent: int
    activations: int


def budget(run: Run, rows: int, *, memory: int | None, chunk: int | None) -> Budget:
    """Cut a sweep with so many cotangents to fit the memory.

    Raises:
        TooLittleMemory: not even one state and one query at a time fit.
    """
    state = run.state(run.kept[-1])
    sizes = bytes_of_state(state), bytes_of_cotangent(state, run.trained), bytes_of_activations(run)
    free = memory or free_memory(run.task.device) // 2
    return cut(*sizes, rows=rows, free=free, chunk=chunk, steps=run.steps)


def cut(state: int, cotangent: int, activations: int, *, rows: int, free: int, chunk: int | None, steps: int) -> Budget:  # noqa: PLR0913
    """The arithmetic of `budget`.

    Raises:
        TooLittleMemory: not even one state and one query at a time fit.
    """
    wanted = chunk or max(1, min(rows, CACHE // max(activations, 1)))
    fixed = rows * cotangent + 3 * cotangent + PRIMAL * activations
    while not chunk and wanted > 1 and fixed + wanted * (PULLED * activations + cotangent) + 2 * state > free:
        wanted //= 2
    left = free - fixed - wanted * (PULLED * activations + cotangent)
    if left < 2 * state:
        raise TooLittleMemory(free, free - left + 2 * state, rows)
    return Budget(min(left // state - 1, steps), wanted, state, cotangent, activations)


PRIMAL, PULLED = 3, 4  # activations kept for a gradient's own derivative, and in flight per query; see docs/memory.md


def bytes_of_state(state: State) -> int:
    """Bytes of a whole state."""
    trees = [state.params, state.buffers, *state.moments.values()]
    return sum(tensor.nbytes for tree in trees for tensor in tree.values())


def bytes_of_cotangent(state: State, trained: tuple[str, ...]) -> int:
    """Bytes of one query's cotangent: the trained parameters and their elementwise moments."""
    copies = {name: 1 + len(elementwise(state.moments.get(name, {}), state.params[name])) for name in trained}
    return sum(state.params[name].nbytes * number for name, number in copies.items())


def bytes_of_activations(run: Run) -> int:
    """Bytes that the forward pass of the run's largest micro-batch keeps, measured by running it."""
    step = max(run.log, key=lambda step: max(len(fed.samples) for fed in step.fed)).index
    transition, state = run.transition(step), run.state(0)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    params = each(lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()), state.params)
    owned = {tensor.untyped_storage().data_ptr() for tensor in params.values()}
    with transition.replaying(), torch.random.fork_rng(), saved_tensors_hooks(note, lambda tensor: tensor):
        losses = [run.task.losses(params, state.buffers, batch)[0] for batch in transition.batches[:1]]
    del losses
    return sum(size for address, size in kept.items() if address not in owned)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def begun_chunk(path: Path | None) -> int | None:
    """The chunk of an attribution that was begun in a folder: going on with it gives the same bits."""
    if path is None or not (path / "zarr.json").is_file():
        return None
    chunk = layout.load(path)[1].settings.get("chunk")
    return chunk if isinstance(chunk, int) else None
