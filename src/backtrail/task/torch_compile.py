"""Looking through `torch.compile`: it wraps a module in another one, and a run knows only the module inside."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

INSIDE = "_orig_mod"  # the wrapper's name for what it wraps; nobody else uses it


def plain(name: str) -> str:
    """The name that a parameter, buffer or module has without compilation.

    >>> plain("_orig_mod.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part != INSIDE)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself, or the one inside."""
    while _wraps(model):
        model = model.get_submodule(INSIDE)
    return model


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under their plain names."""
    return {plain(name): parameter for name, parameter in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers under their plain names."""
    return {plain(name): buffer for name, buffer in model.named_buffers()}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules under their plain names; never a wrapper."""
    return {plain(name): uncompiled(module) for name, module in model.named_modules()}


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without any compilation: what is compiled would run the original's code on the original's weights."""
    for wrapper in _wrappers(model):
        memo[id(wrapper)] = copy.deepcopy(uncompiled(wrapper), memo)
    found = copy.deepcopy(model, memo)
    for module in found.modules():
        # As in model.forward = torch.compile(model.forward).
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            del module.__dict__["forward"]
    return found


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The inner ones first."""
    yield from reversed([module for module in model.modules() if _wraps(module)])


def _wraps(module: nn.Module) -> bool:
    """Whether a module is a wrapper that `torch.compile` made."""
    return any(name == INSIDE for name, _ in module.named_children())
