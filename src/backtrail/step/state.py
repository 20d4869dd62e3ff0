"""What one training step reads and writes, and what is known about a step: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import msgspec
import torch

from backtrail.step.optimizers import COUNTS
from backtrail.tree import Tree, cast, each

Setting = float | int | bool | str | None | tuple[float, ...]


@final
@dataclass(frozen=True, slots=True, repr=False)
class State:
    """Everything one training step reads and writes: what :meth:`backtrail.Run.state` returns.

    >>> import torch
    >>> state = State({"weight": torch.ones(2)})
    >>> state.cast(torch.float64).params["weight"].dtype
    torch.float64

    Attributes:
        params: Every parameter of the model under its unique name.
        buffers: Every buffer of the model.
        moments: The optimizer's tensors by parameter and by the optimizer's own key, for example
            `["weight"]["exp_avg"]`.
    """

    params: Tree
    buffers: Tree = field(default_factory=dict)
    moments: dict[str, Tree] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype | None, device: torch.device | str | None = None) -> "State":
        """The same state in another precision or on another device."""
        return State(*cast((self.params, self.buffers, self.moments), dtype, device))

    def repeat(self, times: int) -> "State":
        """A stack of equal states, with a new first axis on parameters, buffers and elementwise moments."""

        def stack(tree: Tree) -> Tree:
            return each(lambda tensor: tensor.expand(times, *tensor.shape).clone(), tree)

        moments = {
            name: tree | stack({key: tree[key] for key in elementwise(tree, self.params[name])})
            for name, tree in self.moments.items()
        }
        return State(stack(self.params), stack(self.buffers), moments)

    def __repr__(self) -> str:
        """How many tensors of which kind; never the tensors."""
        return (
            f"State({len(self.params)} parameters, {len(self.buffers)} buffers, "
            f"optimizer state of {len(self.moments)})"
        )


def elementwise(moments: Tree, parameter: torch.Tensor) -> list[str]:
    """Keys of the moments that have one entry per entry of the parameter (not step counts)."""
    # A 0-d parameter has the shape of a step count, so the name of the count decides first.
    return [key for key, m in moments.items() if key not in COUNTS and m.shape == parameter.shape]


class BatchRecord(msgspec.Struct, frozen=True):
    """One batch that the loop fed to the model.

    Attributes:
        samples: row numbers of the training set, in slot order.
        epoch: which pass over the loader it came from.
        digest: content hash of the batch as it was fed.
        random: the generators' states before the forward pass, if that pass drew from them, by
            device.
        stored: whether the content itself is kept on disk (otherwise the rows are read again).
        contributes: whether the update consumed its gradient; if not, its forward pass only moved batch
            norm's statistics (a step that a GradScaler skipped).
    """

    samples: tuple[int, ...]
    epoch: int
    digest: str
    random: dict[str, bytes] | None = None
    stored: bool = False
    contributes: bool = True


@final
class Step(msgspec.Struct, frozen=True):
    """What is known about one optimizer update besides the tensors.

    :meth:`backtrail.Run.step` returns it.

    >>> Step(index=0, fed=(), settings=({"lr": 0.1},), norm=2.5).settings[0]["lr"]
    0.1

    Attributes:
        index: Its number, 0 … T-1.
        fed: The batches whose gradients were accumulated, and those that only changed BatchNorm's
            statistics.
        settings: Every hyperparameter of every parameter group, as the update used it.
        norm: Euclidean norm of the gradient that the optimizer consumed.
        unused: Parameters of the optimizer that had no gradient.
        evaluating: Modules that were in eval mode.
        autocast: Precision of the forward passes' autocast, for example "bfloat16"; empty without.
    """

    index: int
    fed: tuple[BatchRecord, ...]
    settings: tuple[dict[str, Setting], ...]
    norm: float
    unused: tuple[str, ...] = ()
    evaluating: tuple[str, ...] = ()
    autocast: str = ""

    @property
    def samples(self) -> tuple[int, ...]:
        """Row numbers of all slots of the step, over the micro-batches whose gradients it consumed, in order."""
        return tuple(sample for fed in self.fed if fed.contributes for sample in fed.samples)

    def __repr__(self) -> str:
        """Number, size and gradient norm in one line."""
        return f"Step({self.index}: {len(self.samples)} samples, gradient norm {self.norm:.3g})"


def settings_of(group: Mapping[str, Any]) -> dict[str, Setting]:
    """The hyperparameters of an optimizer's parameter group as plain numbers."""
    return {key: _plain(value) for key, value in group.items() if key != "params"}


def _plain(value: Any) -> Setting:
    if isinstance(value, torch.Tensor):
        number: float = value.item()
        return number
    if isinstance(value, (tuple, list)):
        return tuple(float(_plain(item)) for item in value)  # type: ignore[arg-type]
    plain: Setting = value
    return plain


def due(step: int) -> bool:
    """Whether what is noted of a training is proven at this step by a replay: at 0, 1, and the powers of four.

    >>> [step for step in range(100) if due(step)]
    [0, 1, 4, 16, 64]
    """
    return step == 0 or (step.bit_count() == 1 and step.bit_length() % 2 == 1)
