r"""BatchNorm as a pure function of its running statistics, differentiable in both modes.

torch's own layer updates its running statistics in place, and has no derivative with respect to
them in eval mode. But training changes them and later queries in eval mode read them, so a
derivative without them would be wrong. Here the statistics μ and σ² come in as tensors, and their
updates are collected as tensors. With momentum a and the batch's mean and variance,

.. math:: \mu \leftarrow (1 - a)\, \mu + a\, \mathrm{mean}(x), \qquad
    \sigma^2 \leftarrow (1 - a)\, \sigma^2 + a\, \mathrm{var}(x)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard, final

from torch import Tensor, nn
from torch.nn.functional import batch_norm

from backtrail.task.torch_compile import modules
from backtrail.tree import Tree

STATISTICS = ("running_mean", "running_var")
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
# What all of them are derived from has no public name; users' own layers may be derived from it.
(_BASE,) = nn.BatchNorm1d.__bases__


def is_batchnorm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a BatchNorm layer, of any number of axes, or derived from one."""
    return isinstance(module, _BASE)


def batchnorm_layers(model: nn.Module) -> dict[str, BatchNorm]:
    """The layers that keep running statistics, by name."""
    layers = {name: module for name, module in modules(model).items() if is_batchnorm(module)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}


@final
class RunningStatistics:
    """Replaces the forward of a skeleton's BatchNorm layers, and collects their new statistics."""

    def __init__(self, model: nn.Module) -> None:
        self._updates: Tree | None = None
        for name, layer in batchnorm_layers(model).items():
            prefix = f"{name}." if name else ""
            layer.forward = partial(self._forward, prefix, layer)  # type: ignore[method-assign]

    @contextmanager
    def collect(self) -> Iterator[Tree]:
        """Return the dict that the next forward pass fills with its statistics, by buffer name."""
        self._updates = {}
        try:
            yield self._updates
        finally:
            self._updates = None

    def _forward(self, prefix: str, layer: BatchNorm, inputs: Tensor) -> Tensor:
        mean = self._current(prefix, layer, "running_mean")
        variance = self._current(prefix, layer, "running_var")
        if not layer.training:
            return _normalise(inputs, layer, mean=mean, variance=variance)
        if self._updates is not None:
            batches = self._current(prefix, layer, "num_batches_tracked")
            if layer.momentum is None:
                # The plain average over all batches. A count divided as it is would be in the
                # default dtype.
                momentum: Any = 1.0 / (batches + 1).to(mean.dtype)
            else:
                momentum = layer.momentum
            axes = [axis for axis in range(inputs.dim()) if axis != 1]
            # Under autocast inputs are coarser than the statistics that torch makes of them.
            read = inputs.to(mean.dtype)
            new_mean = (1 - momentum) * mean + momentum * read.mean(axes)
            new_variance = (1 - momentum) * variance + momentum * read.var(axes)
            self._updates[f"{prefix}running_mean"] = new_mean
            self._updates[f"{prefix}running_var"] = new_variance
            self._updates[f"{prefix}num_batches_tracked"] = batches + 1
        return batch_norm(
            inputs, None, None, layer.weight, layer.bias, training=True, eps=layer.eps
        )

    def _current(self, prefix: str, layer: BatchNorm, key: str) -> Tensor:
        """A statistic before this call: a layer called twice in one pass uses its own update."""
        stored: Tensor = getattr(layer, key)
        return (self._updates or {}).get(prefix + key, stored)


def _normalise(inputs: Tensor, layer: BatchNorm, *, mean: Tensor, variance: Tensor) -> Tensor:
    """BatchNorm in eval mode, as one scale and one shift for each channel."""
    scale = (variance + layer.eps).rsqrt()
    scale = scale * (1.0 if layer.weight is None else layer.weight)
    shift = -mean * scale + (0.0 if layer.bias is None else layer.bias)
    by_channel = [1, -1] + [1] * (inputs.dim() - 2)
    return inputs * scale.view(by_channel) + shift.view(by_channel)
