"""Tensors that a user's functions read besides the batch: of closures and global names."""

from collections.abc import Iterable, Mapping
from functools import partial
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def tensors_used_by(functions: Iterable[object], dtype: torch.dtype) -> list[str]:
    """Names of what functions refer to and what holds tensors of a precision.

    >>> teacher = nn.Linear(2, 2)
    >>> tensors_used_by([lambda outputs, batch: outputs - teacher(batch)], torch.float32)
    ['teacher (nn.Module Linear)']

    Args:
        functions: The user's functions; anything else is skipped.
        dtype: The precision.
    """
    found: dict[str, None] = {}
    for function in functions:
        for name, value in _names_used_by(function).items():
            kind = _kind(value, dtype)
            if kind:
                found[f"{name} ({kind})"] = None
    return list(found)


def _names_used_by(function: object) -> dict[str, object]:
    """What a function's code names, by name: variables of its closure, and globals."""
    match function:
        case partial():
            values = {f"argument {place}": value for place, value in enumerate(function.args)}
            return values | function.keywords | _names_used_by(function.func)
        case MethodType():
            return {**_attributes(function.__self__), **_names_used_by(function.__func__)}
        case FunctionType():
            return _names_used_by_code(function)
    return _attributes(function)


def _names_used_by_code(function: FunctionType) -> dict[str, object]:
    names: dict[str, object] = {}
    for name in function.__code__.co_names:
        if name in function.__globals__:
            names[name] = function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # the variable is not assigned yet
            continue
    return names


def _attributes(value: object) -> dict[str, object]:
    return dict(getattr(value, "__dict__", {}))


def _kind(value: object, dtype: torch.dtype) -> str:
    """What a value is, if it holds tensors of the precision; otherwise empty."""
    if isinstance(value, Tensor):
        return "tensor" if value.dtype == dtype else ""
    if isinstance(value, nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        return f"nn.Module {type(value).__name__}" if _any_of(tensors, dtype) else ""
    if isinstance(value, TensorDataset):
        return "TensorDataset" if _any_of(value.tensors, dtype) else ""
    if isinstance(value, Mapping):
        return "tensors in a dict" if _any_of(value.values(), dtype) else ""
    if isinstance(value, (list, tuple)):
        return f"tensors in a {type(value).__name__}" if _any_of(value, dtype) else ""
    return ""


def _any_of(values: Iterable[object], dtype: torch.dtype) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == dtype for value in values)
