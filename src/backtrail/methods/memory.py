"""How much memory a sweep takes, and how it is cut to fit a budget."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from backtrail.accel.onednn import available
from backtrail.errors import BadSetting, TooLittleMemory
from backtrail.influence import layout
from backtrail.optim.flatten import longest
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.step.state import State, elementwise
from backtrail.tree import each

CACHE = (
    64 * 2**20
)  # bytes of activations up to which pulling more queries at once is faster on a processor
ALONE = (
    8 * 2**20
)  # of one query, from which on it is faster alone, where `vmap` would miss the faster products


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """What a sweep is made of, in bytes.

    Attributes:
        state: one state, S.
        cotangent: one query's cotangent, C: trained parameters and their moments.
        params: the trained parameters alone, P.
        strand: cotangent of the entries whose update is differentiated at once, U.
        activations: what the forward pass of the largest micro-batch keeps for its backward pass,
            A.
    """

    state: int
    cotangent: int
    params: int
    strand: int
    activations: int

    def total(self, rows: int, *, chunk: int, held: int) -> int:
        """Peak of a sweep with so many cotangents (queries x observed states): the formula of docs/memory.md."""
        alive = rows * (self.cotangent + 1.5 * self.params)
        # What one chunk frees is not all used again by the next.
        graph = (3.4 if rows > chunk else 2.6) * self.activations
        pulled = chunk * (2 * self.params + graph)
        fixed = 4.7 * self.activations + 4 * self.params + 7 * self.strand
        return int(held * self.state + alive + pulled + fixed)


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """How a sweep is cut: states in memory at once, and queries pulled at once."""

    held: int
    chunk: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a sweep must keep to; None where that is to be decided.

    Attributes:
        memory: bytes that it may use.
        chunk: how many queries are pulled at once.
    """

    memory: int | None
    chunk: int | None


def budget(run: Run, queries: Query, states: int, *, limits: Limits, twice: bool = True) -> Budget:
    """Cut a sweep for queries at so many observed states to fit the memory.

    Args:
        run: the training.
        queries: what is asked.
        states: at how many states.
        limits: what it must keep to.
        twice: whether the loss is differentiated twice, for which attention takes another kernel.

    Raises:
        TooLittleMemory: not even one state and one query at a time fit.
    """
    free, sizes = limits.memory or free_memory(run.task.device) // 2, sizes_of(run, twice=twice)
    if isinstance(queries, Averaged):  # a gradient waits beside every cotangent
        sizes = replace(sizes, cotangent=sizes.cotangent + sizes.params)
    rows = len(queries.names) * states
    return cut(sizes, rows=rows, free=free, chunk=limits.chunk, steps=run.steps)


def gradients_at_once(run: Run, rows: int, *, memory: int | None, chunk: int | None) -> int:
    """How many queries are pulled at once where their gradients are all there is: no moments, no update.

    Raises:
        TooLittleMemory: not even one query at a time fits.
    """
    free = memory or free_memory(run.task.device) // 2
    sizes = replace(sizes_of(run), cotangent=0, strand=0)
    return cut(sizes, rows=rows, free=free, chunk=chunk, steps=run.steps).chunk


def check_limits(*, memory: int | None, chunk: int | None) -> None:
    """Refuse limits that nothing fits into.

    Raises:
        BadSetting: names the setting, and what it may be.
    """
    for name, number in (("memory", memory), ("chunk", chunk)):
        if number is not None and number < 1:
            raise BadSetting(name, number, "a positive number, or None")


def cut(sizes: Sizes, *, rows: int, free: int, chunk: int | None, steps: int) -> Budget:
    """The largest chunk that is of use, then as many states as fit beside it.

    Raises:
        TooLittleMemory: not even one state and one query at a time fit.
    """
    useful = 1 if sizes.activations >= ALONE and available() else CACHE // max(sizes.activations, 1)
    wanted = chunk or max(1, min(rows, useful))
    while not chunk and wanted > 1 and sizes.total(rows, chunk=wanted, held=2) > free:
        wanted //= 2
    left = free - sizes.total(rows, chunk=wanted, held=1)
    if left < 0:
        raise TooLittleMemory(free, free - left, rows)
    return Budget(min(1 + left // max(sizes.state, 1), steps), wanted)


def sizes_of(run: Run, *, twice: bool = True) -> Sizes:
    """Sizes of a run's sweep, from its last kept state and one forward pass."""
    state = run.state(run.kept[-1])
    params = {name: state.params[name] for name in run.trained}
    entries, cotangent = (
        sum(tensor.numel() for tensor in params.values()),
        bytes_of_cotangent(state, run.trained),
    )
    return Sizes(
        bytes_of_state(state),
        cotangent,
        sum(tensor.nbytes for tensor in params.values()),
        cotangent * min(entries, longest(params[run.trained[0]])) // entries,
        bytes_of_activations(run, twice=twice),
    )


def bytes_of_state(state: State) -> int:
    """Bytes of a whole state."""
    trees = [state.params, state.buffers, *state.moments.values()]
    return sum(tensor.nbytes for tree in trees for tensor in tree.values())


def bytes_of_cotangent(state: State, trained: Sequence[str]) -> int:
    """Bytes of one query's cotangent: the trained parameters and their elementwise moments."""
    copies = {
        name: 1 + len(elementwise(state.moments.get(name, {}), state.params[name]))
        for name in trained
    }
    return sum(state.params[name].nbytes * number for name, number in copies.items())


def bytes_of_activations(run: Run, *, twice: bool) -> int:
    """Bytes that the forward pass of the run's largest micro-batch keeps, measured by running it."""
    step = max(run.log, key=lambda step: max(len(fed.samples) for fed in step.fed)).index
    transition, state = run.transition(step), run.state(0)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a graph whose tensors hold the graph would never be freed

    params = each(
        lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()), state.params
    )
    owned = {tensor.untyped_storage().data_ptr() for tensor in params.values()}
    with (
        transition.replaying(twice=twice),
        torch.random.fork_rng(),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        losses = [
            run.task.losses(params, state.buffers, batch)[0] for batch in transition.batches[:1]
        ]
    del losses
    return sum(size for address, size in kept.items() if address not in owned)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def begun_chunk(path: Path | None) -> int | None:
    """The chunk of an attribution that was begun in a folder: going on with it gives the same bits."""
    chunk = begun_settings(path).get("chunk")
    return chunk if isinstance(chunk, int) else None


def begun_settings(path: Path | None) -> dict[str, object]:
    """The settings of an attribution that was begun in a folder; none where there is none."""
    if path is None or not (path / "zarr.json").is_file():
        return {}
    return dict(layout.load(path)[1].settings)
