"""Random numbers that a model draws: the same ones in another precision, and at every reading.

From one state of a generator, torch draws other normal (of 16 entries and more) and uniform numbers
in float64 than in float32. A training in float32 that is run again in float64 must therefore draw
in float32, or it is another training. The numbers are replaced below autograd and the transforms of
torch.func, where every draw passes, also those in the middle of a torch function.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backtrail.task.dropout import SameDropout

# A mode sees every operation of torch. The class is not typed, which would show at every use.
DispatchMode: Any = TorchDispatchMode
HALF = (torch.bfloat16, torch.float16)
SEED = 0  # of the numbers that a query or a ranking draws, whatever the state of the generators


@final
class SameNumbers(DispatchMode):  # type: ignore[misc]
    """While entered, tensors of one precision are filled with the numbers of another.

    A draw into a tensor of the precision `computed` is made in the precision `recorded` and cast.
    A draw in any other precision, such as torch's default for `torch.randn(4)`, was made in that
    one by the training too, and stays as it is.

    Args:
        recorded: precision of the training.
        computed: precision of the re-run.
    """

    def __init__(self, recorded: torch.dtype, computed: torch.dtype) -> None:
        super().__init__()
        self.recorded = recorded
        self.computed = computed

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draw here, and call every other operation as it is."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        name = _name(function)
        if name.endswith("_") and self._is_computed(args[0]):
            return self._fill(function, args, kwargs)
        if name == "native_dropout" and self._is_computed(args[0]):
            return self._dropout(function, *args)
        if name == "normal" and any(map(self._is_computed, args)):
            return self._normal(*args, **kwargs)
        if name == "bernoulli" and self._is_computed(args[0]):
            # Of chances in another precision, other numbers are drawn.
            drawn = function(args[0].to(self.recorded), *args[1:], **kwargs)
            return drawn.to(self.computed)
        if self._returns_computed(name, args, kwargs):
            return function(*args, **kwargs | {"dtype": self.recorded}).to(self.computed)
        return function(*args, **kwargs)

    def _is_computed(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.dtype == self.computed

    def _returns_computed(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a function that takes `dtype=` would return a tensor of that precision."""
        dtype = kwargs.get("dtype")
        if dtype is None and name in {"randn_like", "rand_like", "randint_like"}:
            return self._is_computed(args[0])
        return dtype == self.computed

    def _fill(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Fill a tensor in place. Kernels draw in the order of memory, which must be the same."""
        target = args[0]
        drawn = torch.empty_strided(
            target.size(), target.stride(), dtype=self.recorded, device=target.device
        )
        others = [arg.to(self.recorded) if self._is_computed(arg) else arg for arg in args[1:]]
        filled: Tensor = target.copy_(function(drawn, *others, **kwargs))
        return filled

    def _dropout(
        self, function: Any, input: Tensor, p: float, *train: bool
    ) -> tuple[Tensor, Tensor]:
        _, mask = function(input.to(self.recorded), p, *train)
        # Not the output of the drawn dropout, whose entries were rounded.
        scale = 1 / (1 - p) if p < 1 else 0.0
        return input * mask * scale, mask

    def _normal(self, mean: Any, std: Any = 1.0, *, generator: Any = None) -> Tensor:
        """Numbers of tensors of means and deviations, which are not rounded."""
        tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
        # Of the shape that both have together.
        drawn = torch.empty_like(sum(tensors[1:], tensors[0]), dtype=self.recorded)
        standard = drawn.normal_(generator=generator).to(self.computed)
        numbers: Tensor = standard * std + mean
        return numbers


@final
class ConstantNumbers(DispatchMode):  # type: ignore[misc]
    """While entered, every drawn number is a constant, the same for all rows of a batch.

    For comparing rows alone with rows in a batch, which draw other numbers.
    """

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the numbers of a draw; permutations and choices are drawn as they are."""
        found = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return found
        if isinstance(found, Tensor) and found.is_floating_point():
            return found.fill_(0.5)
        if isinstance(found, Tensor) and _name(function).startswith(("randint", "random")):
            # The lowest: `randint.low(low, high, size)` has it first, `randint(high, size)` none.
            low = args[0] if "low" in function.__name__ and not isinstance(args[0], Tensor) else 0
            return found.fill_(low)
        return found


@final
class CoarseDraws(DispatchMode):  # type: ignore[misc]
    """While entered, notes draws of numbers in half precision, except for dropout's masks.

    Attributes:
        found: names of the operations with their precision, such as "randn_like in bfloat16".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call every operation as it is."""
        found = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags:
            name = _name(function)
            is_mask = name in {"bernoulli", "bernoulli_", "native_dropout"}
            if isinstance(found, Tensor) and found.dtype in HALF and not is_mask:
                self.found[f"{name} in {str(found.dtype).removeprefix('torch.')}"] = None
        return found


def _name(function: Any) -> str:
    """Name of an operation without its overload, like `normal_`."""
    name: str = function.__name__
    return name.partition(".")[0]


@contextmanager
def drawn_as_recorded(recorded: torch.dtype, computed: torch.dtype) -> Iterator[None]:
    """Draw the numbers that the training drew from the same states of the generators.

    Args:
        recorded: precision of the training.
        computed: precision of this pass.
    """
    numbers: AbstractContextManager[object] = nullcontext()
    if recorded != computed:
        # Only then, since every operation inside it takes longer.
        numbers = SameNumbers(recorded, computed)
    with numbers, SameDropout():
        yield


@contextmanager
def fixed_noise(
    device: torch.device, recorded: torch.dtype, computed: torch.dtype
) -> Iterator[Callable[[], None]]:
    """Draw the same numbers at every reading, and restore the generators afterwards.

    Args:
        device: on which the model is read.
        recorded: precision of the training.
        computed: precision of this reading.

    Yields:
        A function that sets the generators to the fixed state again.
    """
    on_cuda = device.type == "cuda"
    state = torch.Generator().manual_seed(SEED).get_state()

    def reset() -> None:
        torch.set_rng_state(state)
        if on_cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(SEED)

    with torch.random.fork_rng([device] if on_cuda else []):
        reset()
        with drawn_as_recorded(recorded, computed):
            yield reset
