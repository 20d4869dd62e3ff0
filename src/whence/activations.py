"""Activations that are a formula of a dozen passes: each can be seen as one function, taken entry by entry."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.overrides import handle_torch_function, has_torch_function_unary

ALIKE: dict[str, Callable[[Tensor], Tensor] | None] = {  # torch's own of the same formula, in few passes
    "NewGELUActivation": partial(gelu, approximate="tanh"),
    "AccurateGELUActivation": partial(gelu, approximate="tanh"),
    "FastGELUActivation": None,
    "QuickGELUActivation": None,
}


def join(module: nn.Module) -> None:
    """Let a `TorchFunctionMode` see a composed activation of transformers as `composed`."""
    name = type(module).__name__
    if name in ALIKE and type(module).__module__.startswith("transformers."):
        module.forward = partial(composed, module.forward, alike=ALIKE[name])


def composed(
    function: Callable[[Tensor], Tensor], x: Tensor, *, alike: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Apply a function of every entry; a mode may take another one that is equal to rounding.

    >>> composed(abs, Tensor([-1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    if has_torch_function_unary(x):
        found: Tensor = handle_torch_function(composed, (x,), function, x, alike=alike)
        return found
    return function(x)
