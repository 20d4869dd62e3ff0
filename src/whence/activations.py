"""Activations that are a formula of a dozen passes: each can be seen as one function, taken entry by entry."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

COMPOSED = frozenset({"NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation"})


def join(module: nn.Module) -> None:
    """Let a `TorchFunctionMode` see a composed activation of transformers as `composed`."""
    if type(module).__name__ in COMPOSED and type(module).__module__.startswith("transformers."):
        module.forward = partial(composed, module.forward)


def composed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of every entry.

    >>> composed(abs, Tensor([-1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    if has_torch_function_unary(x):
        found: Tensor = handle_torch_function(composed, (x,), function, x)
        return found
    return function(x)
