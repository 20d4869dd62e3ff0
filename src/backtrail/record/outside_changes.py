"""Notices what something other than the recorded optimizer writes between two steps.

A run explains a training only if every step starts from what the step before it left: the same
parameters and the same optimizer state.

Torch counts writes in place, which costs nothing to read, but writes through `.data` are not
counted. So the norm of evenly spaced entries of every tensor is compared as well: of all entries,
it would cost as much as a part of the training's step.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backtrail.step.update import tensors_of
from backtrail.tree import Tree, count_writes

# Entries of a tensor that are compared. So few are summed up by one thread, always in one order, so
# the norms of equal entries are equal to the bit.
MOST_COMPARED = 4096


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
        self._norms: Tree = {}
        # The tensors themselves, so that an equal copy in their place is known as equal.
        self._moments: dict[str, Tree] = {}
        self._moment_writes: dict[str, dict[str, int]] = {}
        self._moment_norms: Tree = {}

    @property
    def started(self) -> bool:
        """Whether there is anything to compare with."""
        return self._writes is not None

    def remember_parameters(self) -> None:
        """Note the parameters as they are now."""
        self._writes = self.parameter_writes()
        self._norms = _norms(self._live_params())

    def remember(self) -> None:
        """Note the parameters and the optimizer state as they are now."""
        self.remember_parameters()
        self._moments = self.moments()
        self._moment_writes = {}
        for name, tensors in self._moments.items():
            self._moment_writes[name] = {key: count_writes(t) for key, t in tensors.items()}
        self._moment_norms = _norms(_flattened(self._moments))

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
        return _different(self._norms, _norms(self._live_params()))

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
        different = _different(self._moment_norms, _norms(_flattened(present)))
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


def _norms(tensors: Tree) -> Tree:
    """Norm of some entries of every tensor, without waiting for its device."""
    names: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            names.setdefault(tensor.device, []).append(name)
    found: Tree = {}
    for members in names.values():
        # One call for all tensors: hundreds of small kernels would take longer than a step.
        norms = torch._foreach_norm([_compared(tensors[name]) for name in members])
        found.update(zip(members, norms, strict=True))
    return found


def _compared(tensor: Tensor) -> Tensor:
    """Evenly spaced entries, in float32 at least."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.flatten()
    if len(flat) > MOST_COMPARED:
        flat = flat[:: -(-len(flat) // MOST_COMPARED)]
    return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()


def _different(before: Tree, after: Tree) -> list[str]:
    """Names whose norms differ; one wait for every device."""
    if before.keys() != after.keys():
        return sorted(before.keys() ^ after.keys())
    members: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, value in before.items():
        members.setdefault((value.device, value.dtype), []).append(name)
    different: list[str] = []
    for names in members.values():
        noted = torch.stack([before[name] for name in names])
        found = torch.stack([after[name].to(before[name].device) for name in names])
        same = (noted == found) | (noted.isnan() & found.isnan())
        different += [name for name, equal in zip(names, same.tolist(), strict=True) if not equal]
    return different
