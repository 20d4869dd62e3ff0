"""How much memory a sweep takes, and how it is cut to fit a budget."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from backtrail import arguments
from backtrail.accel.onednn import available
from backtrail.errors import BacktrailError, TooLittleMemory
from backtrail.influence import layout
from backtrail.optim.flatten import longest_chunk
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.step.state import State, elementwise_keys
from backtrail.task.noise import DispatchMode
from backtrail.tree import each, tree_leaves

# Bytes of activations up to which pulling more queries at once is faster on a CPU.
CACHE = 64 * 2**20
# Bytes of one query's activations from which on it is faster alone: under `vmap` it would miss the
# faster products of oneDNN.
ALONE = 8 * 2**20


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """What a sweep is made of, in bytes.

    Attributes:
        state: One state, S.
        cotangent: One query's cotangent, C: trained parameters and their moments.
        params: The trained parameters alone, P.
        chunk: Cotangent of the entries whose update is differentiated at once, U.
        activations: What the forward pass of the largest micro-batch keeps for its backward pass,
            A.
    """

    state: int
    cotangent: int
    params: int
    chunk: int
    activations: int

    def total(self, rows: int, *, chunk: int, held: int) -> int:
        """Estimate the peak of a sweep; docs/memory.md has the formula and its measurement.

        Args:
            rows: Cotangents, queries x observed states.
            chunk: Queries pulled at once.
            held: States in memory at once.
        """
        cotangents = rows * (self.cotangent + 1.5 * self.params)
        # What one chunk frees is not all used again by the next.
        graph = (3.4 if rows > chunk else 2.6) * self.activations
        pulled = chunk * (2 * self.params + graph)
        fixed = 4.7 * self.activations + 4 * self.params + 7 * self.chunk
        return int(held * self.state + cotangents + pulled + fixed)


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
        memory: Bytes that it may use.
        chunk: How many queries are pulled at once.
    """

    memory: int | None
    chunk: int | None


def budget(run: Run, queries: Query, states: int, *, limits: Limits, twice: bool = True) -> Budget:
    """Cut a sweep for queries to fit the memory.

    Args:
        run: The training.
        queries: What is asked.
        states: Number of observed states.
        limits: What the sweep must keep to.
        twice: Whether the loss is differentiated twice, for which attention takes another kernel.

    Raises:
        TooLittleMemory: Not even one state and one query at a time fit.
    """
    free = limits.memory or free_memory(run.task.device) // 2
    sizes = sizes_of(run, twice=twice)
    if isinstance(queries, Averaged):
        # A gradient waits beside every cotangent.
        sizes = replace(sizes, cotangent=sizes.cotangent + sizes.params)
    rows = len(queries.names) * states
    return fit(sizes, rows=rows, free=free, chunk=limits.chunk, steps=run.steps)


def gradient_chunk(run: Run, rows: int, *, limits: Limits) -> int:
    """Decide how many queries are pulled at once if a method needs their gradients alone.

    There are no moments then, and no update.

    Raises:
        TooLittleMemory: Not even one query at a time fits.
    """
    free = limits.memory or free_memory(run.task.device) // 2
    sizes = replace(sizes_of(run), cotangent=0, chunk=0)
    return fit(sizes, rows=rows, free=free, chunk=limits.chunk, steps=run.steps).chunk


def keep_limits(method: object, limits: Limits) -> None:
    """Check the limits of a method, a frozen dataclass, and keep them there as plain numbers.

    Raises:
        BadSetting: Names the setting, and what it may be.
    """
    # numpy's and torch's numbers could not be stored with a result.
    object.__setattr__(method, "memory", arguments.positive_or_none("memory", limits.memory))
    object.__setattr__(method, "chunk", arguments.positive_or_none("chunk", limits.chunk))


def fit(sizes: Sizes, *, rows: int, free: int, chunk: int | None, steps: int) -> Budget:
    """Take the largest chunk that is of use, then as many states as fit beside it.

    Raises:
        TooLittleMemory: Not even one state and one query at a time fit.
    """
    if sizes.activations >= ALONE and available():
        useful = 1
    else:
        useful = CACHE // max(sizes.activations, 1)
    # More at once than there are would only be counted as memory.
    wanted = min(chunk, rows) if chunk else max(1, min(rows, useful))
    if chunk is None:
        while wanted > 1 and sizes.total(rows, chunk=wanted, held=2) > free:
            wanted //= 2
    left = free - sizes.total(rows, chunk=wanted, held=1)
    if left < 0:
        raise TooLittleMemory(free, free - left, rows)
    held = 1 + left // max(sizes.state, 1)
    return Budget(min(held, steps), wanted)


def sizes_of(run: Run, *, twice: bool = True) -> Sizes:
    """Measure the sizes of a run's sweep, by its last kept state and one forward pass."""
    state = run.state(run.kept[-1])
    params = [state.params[name] for name in run.trained]
    entries = sum(tensor.numel() for tensor in params)
    cotangent = bytes_of_cotangent(state, run.trained)
    return Sizes(
        state=bytes_of_state(state),
        cotangent=cotangent,
        params=sum(tensor.nbytes for tensor in params),
        chunk=cotangent * min(entries, longest_chunk(params[0])) // entries,
        activations=bytes_of_activations(run, twice=twice),
    )


def bytes_of_state(state: State) -> int:
    """Bytes of a whole state."""
    trees = [state.params, state.buffers, *state.moments.values()]
    return sum(tensor.nbytes for tree in trees for tensor in tree.values())


def bytes_of_cotangent(state: State, trained: Sequence[str]) -> int:
    """Bytes of one query's cotangent: the trained parameters and their elementwise moments."""
    total = 0
    for name in trained:
        parameter = state.params[name]
        moments = elementwise_keys(state.moments.get(name, {}), parameter)
        total += parameter.nbytes * (1 + len(moments))
    return total


def bytes_of_activations(run: Run, *, twice: bool) -> int:
    """Measure the bytes that the forward pass of the run's largest micro-batch keeps.

    Raises:
        BacktrailError: The task is wrong.
    """
    sizes = {
        (step.index, place): len(fed.samples)
        for step in run.log
        for place, fed in enumerate(step.fed)
    }
    step, place = max(sizes, key=lambda key: sizes[key])
    transition = run.transition(step)
    state = run.state(0)
    kept: dict[int, int] = {}  # address of a storage -> its bytes

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a graph whose tensors hold the graph would never be freed

    params = each(
        lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()), state.params
    )
    owned = {tensor.untyped_storage().data_ptr() for tensor in params.values()}
    micro_batch = transition.micro_batches()[place]
    try:
        with (
            transition.replaying(double_backward=twice),
            torch.random.fork_rng(),
            saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            value = micro_batch.loss(params, state.buffers, None)
        # The graph lives until here, so no two storages had one address.
        del value
    except BacktrailError:
        raise
    except RuntimeError:
        # Transforms of torch.func inside the model cannot live with hooks on saved tensors.
        outputs = _OutputBytes()
        with transition.replaying(double_backward=twice), torch.random.fork_rng(), outputs:
            micro_batch.loss(params, state.buffers, None)
        return outputs.total
    return sum(size for address, size in kept.items() if address not in owned)


@final
class _OutputBytes(DispatchMode):  # type: ignore[misc]
    """Adds up the bytes of all tensors that operations return: no less than a graph keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and count what it returns."""
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            # A view shares the memory of an input.
            if isinstance(tensor, Tensor) and not function.is_view:
                self.total += tensor.nbytes
        return found


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Without that file: half of all memory.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def unfinished_chunk(path: Path | None) -> int | None:
    """Read the chunk of an unfinished attribution: resuming with it gives the same bits."""
    chunk = unfinished_settings(path).get("chunk")
    return chunk if isinstance(chunk, int) else None


def unfinished_settings(path: Path | None) -> dict[str, object]:
    """Read the settings of an unfinished attribution in a folder; empty if there is none."""
    if path is None or not (path / "zarr.json").is_file():
        return {}
    _, description = layout.load(path)
    return dict(description.settings)
