"""Notices what something other than the recorded optimizer writes between two steps.

A run explains a training only if every step starts from what the step before it left: the same
parameters and the same optimizer state.

Torch counts writes in place, which costs nothing to read, but writes through `.data` are not
counted. So evenly spaced entries of every tensor are compared as well: all entries would cost as
much as a part of the training's step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backtrail.step.update import tensors_of
from backtrail.tree import Tree, count_writes

# Entries of a tensor that are compared, or up to twice as many. What writes through `.data` mostly
# writes to whole tensors.
COMPARED = 4096


@final
@dataclass(frozen=True, slots=True)
class _Entries:
    """Some entries of every tensor of one kind.

    Attributes:
        sizes: how many entries each tensor has here, by name.
        values: of all of them, one after the other.
    """

    sizes: dict[str, int]
    values: Tensor

    def different(self, other: "_Entries") -> list[str]:
        """Names of the tensors whose entries differ."""
        if self.sizes != other.sizes:
            return sorted({name for name, _ in self.sizes.items() ^ other.sizes.items()})
        # One wait for the device, and no more where all is well.
        if torch.equal(self.values, other.values):
            return []
        same = self.values == other.values
        same |= self.values.isnan() & other.values.isnan()
        parts = torch.split(same, list(self.sizes.values()))
        return [name for name, part in zip(self.sizes, parts, strict=True) if not part.all()]


Kind = tuple[torch.device, torch.dtype]


@final
class OutsideChanges:
    """Compares parameters and optimizer state with what the last recorded step left.

    Args:
        params: every parameter of the model.
        trained: those that the optimizer holds.
        optimizer: the recorded optimizer.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        trained: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
    ) -> None:
        self._params = params
        self._trained = trained
        self._optimizer = optimizer
        self._writes: dict[str, int] | None = None  # of the parameters; None before the first batch
        self._entries: dict[Kind, _Entries] = {}
        # The tensors themselves, so that an equal copy in their place is known as equal.
        self._moments: dict[str, Tree] = {}
        self._moment_writes: dict[str, dict[str, int]] = {}
        self._moment_entries: dict[Kind, _Entries] = {}

    @property
    def started(self) -> bool:
        """Whether there is anything to compare with."""
        return self._writes is not None

    def remember_parameters(self) -> None:
        """Note the parameters as they are now."""
        self._writes = self.parameter_writes()
        self._entries = _entries(self._live_params())

    def remember(self) -> None:
        """Note the parameters and the optimizer state as they are now."""
        self.remember_parameters()
        self._moments = self.moments()
        self._moment_writes = {}
        for name, tensors in self._moments.items():
            self._moment_writes[name] = {key: count_writes(t) for key, t in tensors.items()}
        self._moment_entries = _entries(_flattened(self._moments))

    def parameter_writes(self) -> dict[str, int]:
        """How often each parameter has been written to."""
        return {name: count_writes(parameter) for name, parameter in self._params.items()}

    def changed_parameters(self) -> list[str]:
        """Parameters that something has written to since they were noted."""
        if self._writes is None:
            return []
        writes = self.parameter_writes()
        changed = [name for name, count in writes.items() if count != self._writes[name]]
        if changed:
            return changed
        return _different(self._entries, _entries(self._live_params()))

    def changed_moments(self) -> list[str]:
        """Descriptions of the optimizer's tensors that were changed since they were noted."""
        if not self._moments:
            return []
        present = self.moments()
        changed: list[str] = []
        for name in dict.fromkeys([*self._moments, *present]):
            before = self._moments.get(name, {})
            after = present.get(name, {})
            for key in dict.fromkeys([*before, *after]):
                if key not in after:
                    changed.append(f"{key!r} of parameter {name!r} is gone")
                elif key not in before:
                    changed.append(f"{key!r} of parameter {name!r} is new")
                elif not self._is_same(name, key, after[key]):
                    changed.append(f"{key!r} of parameter {name!r} has other values")
        if changed:
            return changed
        different = _different(self._moment_entries, _entries(_flattened(present)))
        return [f"{label} has other values" for label in different]

    def _is_same(self, name: str, key: str, tensor: Tensor) -> bool:
        noted = self._moments[name][key]
        if count_writes(noted) != self._moment_writes[name][key]:
            return False
        # Another object may hold the same values: `load_state_dict` copies.
        same_memory = tensor.data_ptr() == noted.data_ptr() and tensor.shape == noted.shape
        if same_memory:
            return True
        if tensor.shape != noted.shape or tensor.dtype != noted.dtype:
            return False
        return torch.equal(tensor, noted.to(tensor.device))

    def moments(self) -> dict[str, Tree]:
        """The tensors of the optimizer's state, of the parameters that have any."""
        moments: dict[str, Tree] = {}
        for name, parameter in self._trained.items():
            # `get`, because indexing would create an entry in the live optimizer's state.
            state = self._optimizer.state.get(parameter)
            tensors = tensors_of(state) if state else {}
            if tensors:
                moments[name] = tensors
        return moments

    def _live_params(self) -> Tree:
        return {name: parameter.detach() for name, parameter in self._params.items()}


def _flattened(moments: dict[str, Tree]) -> Tree:
    flat: Tree = {}
    for name, tensors in moments.items():
        for key, tensor in tensors.items():
            flat[f"{key!r} of parameter {name!r}"] = tensor
    return flat


def _entries(tensors: Tree) -> dict[Kind, _Entries]:
    """Some entries of every tensor, without waiting for its device."""
    views: dict[Kind, Tree] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            views.setdefault((tensor.device, tensor.dtype), {})[name] = _some(tensor)
    found: dict[Kind, _Entries] = {}
    for kind, members in views.items():
        sizes = {name: view.numel() for name, view in members.items()}
        # One call for all tensors: hundreds of small kernels would take longer than a step.
        found[kind] = _Entries(sizes, torch.cat(list(members.values())))
    return found


def _some(tensor: Tensor) -> Tensor:
    """A view of evenly spaced entries."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        flat = flat.flatten()
    spacing = max(1, flat.numel() // COMPARED)
    return flat.as_strided((-(-flat.numel() // spacing),), (spacing,))


def _different(before: dict[Kind, _Entries], after: dict[Kind, _Entries]) -> list[str]:
    """Names whose entries differ."""
    different: list[str] = []
    for kind in before.keys() | after.keys():
        if kind in before and kind in after:
            different += before[kind].different(after[kind])
        else:
            different += (before.get(kind) or after[kind]).sizes
    return different
