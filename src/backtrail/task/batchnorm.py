"""BatchNorm as a pure function: statistics come in and go out as tensors, and both ways can be differentiated.

torch's own layer updates its running statistics in place and has no derivative with respect to them
in eval mode. But training moves them and later eval-mode queries read them, so a derivative that
ignores them is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard, final

from torch import Tensor, nn
from torch.nn.functional import batch_norm

from backtrail.task.torch_compile import modules
from backtrail.tree import Tree

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
# What all of them are derived from has no public name; users' own layers may be derived from it.
(_BASE,) = nn.BatchNorm1d.__bases__
STATISTICS = ("running_mean", "running_var")


def is_batchnorm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a BatchNorm layer, of any number of axes, or derived from one."""
    return isinstance(module, _BASE)


def tracking(model: nn.Module) -> dict[str, BatchNorm]:
    """The layers that keep running statistics, by name."""
    layers = {name: module for name, module in modules(model).items() if is_batchnorm(module)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}


@final
class RunningStatistics:
    """Replaces the forward of a skeleton's BatchNorm layers and collects the statistics they would have written."""

    def __init__(self, model: nn.Module) -> None:
        self._updates: Tree | None = None
        for name, layer in tracking(model).items():
            layer.forward = partial(self._forward, f"{name}." if name else "", layer)  # type: ignore[method-assign]

    @contextmanager
    def collected(self) -> Iterator[Tree]:
        """Hand out the dict that the statistics of the coming forward pass go into, by buffer name."""
        self._updates = {}
        try:
            yield self._updates
        finally:
            self._updates = None

    def _forward(self, prefix: str, layer: BatchNorm, inputs: Tensor) -> Tensor:
        mean, variance, seen = (
            self._current(prefix, layer, key) for key in (*STATISTICS, "num_batches_tracked")
        )
        if not layer.training:
            return _normalise(inputs, layer, mean=mean, variance=variance)
        if self._updates is not None:
            momentum = 1.0 / (seen + 1) if layer.momentum is None else layer.momentum
            axes = [axis for axis in range(inputs.dim()) if axis != 1]
            # Under autocast inputs are coarser than the statistics that torch makes of them.
            read = inputs.to(mean.dtype)
            self._updates[f"{prefix}running_mean"] = (1 - momentum) * mean + momentum * read.mean(
                axes
            )
            self._updates[f"{prefix}running_var"] = (1 - momentum) * variance + momentum * read.var(
                axes
            )
            self._updates[f"{prefix}num_batches_tracked"] = seen + 1
        return batch_norm(
            inputs, None, None, layer.weight, layer.bias, training=True, eps=layer.eps
        )

    def _current(self, prefix: str, layer: BatchNorm, key: str) -> Tensor:
        """A layer that is called twice in one pass goes on from its own update."""
        stored: Tensor = getattr(layer, key)
        return (self._updates or {}).get(prefix + key, stored)


def _normalise(inputs: Tensor, layer: BatchNorm, *, mean: Tensor, variance: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (inputs.dim() - 2)
    scale = (variance + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight)
    shift = -mean * scale + (0.0 if layer.bias is None else layer.bias)
    return inputs * scale.view(shape) + shift.view(shape)
