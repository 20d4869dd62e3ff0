"""Names and copies of a model as if it were not compiled.

`torch.compile` wraps a module in another one. A recording knows only the modules inside.
"""

import copy
from typing import Any

from torch import Tensor, nn

# The wrapper's name for the module that it wraps. No other module of torch has such a child.
INSIDE = "_orig_mod"


def plain(name: str) -> str:
    """The name of a parameter, buffer or module without compilation.

    >>> plain("_orig_mod.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part != INSIDE)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside of all wrappers, or the module itself."""
    while _wraps(model):
        model = model.get_submodule(INSIDE)
    return model


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters, by their names without compilation."""
    return {plain(name): parameter for name, parameter in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers, by their names without compilation."""
    return {plain(name): buffer for name, buffer in model.named_buffers()}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules, by their names without compilation; no wrapper is among them."""
    return {plain(name): uncompiled(module) for name, module in model.named_modules()}


def deepcopy_uncompiled(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a model deeply, with every compiled module replaced by the module inside.

    A copied wrapper would run the code that was compiled for the original, on its weights.

    Args:
        model: what to copy.
        memo: copies of objects by the objects' ids, as `copy.deepcopy` takes it.
    """
    wrappers = [module for module in model.modules() if _wraps(module)]
    # The inner ones first: an outer one's copy contains theirs.
    for wrapper in reversed(wrappers):
        memo[id(wrapper)] = copy.deepcopy(uncompiled(wrapper), memo)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        # As in model.forward = torch.compile(model.forward).
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            del module.__dict__["forward"]
    return copied


def _wraps(module: nn.Module) -> bool:
    """Whether a module is a wrapper that `torch.compile` made."""
    return any(name == INSIDE for name, _ in module.named_children())
