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
        params, buffers, moments = cast((self.params, self.buffers, self.moments), dtype, device)
        return State(params, buffers, moments)

    def repeat(self, times: int) -> "State":
        """A stack of equal states: parameters, buffers and elementwise moments `[run, ...]`.

        Step counts get no such axis, since the runs of a stack are always at the same step.
        """

        def stack(tree: Tree) -> Tree:
            return each(lambda tensor: tensor.expand(times, *tensor.shape).clone(), tree)

        moments: dict[str, Tree] = {}
        for name, tree in self.moments.items():
            keys = elementwise_keys(tree, self.params[name])
            moments[name] = tree | stack({key: tree[key] for key in keys})
        return State(stack(self.params), stack(self.buffers), moments)

    def __repr__(self) -> str:
        """How many tensors of which kind; never the tensors."""
        return (
            f"State({len(self.params)} parameters, {len(self.buffers)} buffers, "
            f"optimizer state of {len(self.moments)})"
        )


def elementwise_keys(moments: Tree, parameter: torch.Tensor) -> list[str]:
    """Keys of the moments with one entry for each entry of the parameter: all but step counts."""
    # A 0-d parameter has the shape of a step count, so the name of the count decides first.
    return [key for key, m in moments.items() if key not in COUNTS and m.shape == parameter.shape]


class BatchRecord(msgspec.Struct, frozen=True):
    """One batch that the loop fed to the model.

    Attributes:
        samples: Row numbers of the training set, in slot order.
        epoch: Which pass over the loader it came from.
        digest: Content hash of the batch as it was fed.
        random: State of the random generator of each device before the forward pass; None if that
            pass drew no random numbers.
        stored: Whether the content itself is kept on disk; otherwise the rows are read again.
        contributes: Whether the update consumed its gradient. If not, its forward pass only changed
            BatchNorm's statistics (a step that a GradScaler skipped).
        may_depend_on_model: Whether the loop replaced it by `recorder.fed(batch)` and did not say
            that its content does not depend on the model. Influence holds that content constant.
    """

    samples: tuple[int, ...]
    epoch: int
    digest: str
    random: dict[str, bytes] | None = None
    stored: bool = False
    contributes: bool = True
    may_depend_on_model: bool = False


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
        """Row numbers of all slots in order, over the micro-batches whose gradients it consumed."""
        return tuple(sample for fed in self.fed if fed.contributes for sample in fed.samples)

    def __repr__(self) -> str:
        """Number, size and gradient norm in one line."""
        return f"Step({self.index}: {len(self.samples)} samples, gradient norm {self.norm:.3g})"


def settings_of(group: Mapping[str, Any]) -> dict[str, Setting]:
    """Hyperparameters of an optimizer's parameter group, with tensors as plain numbers."""
    return {key: _plain(value) for key, value in group.items() if key != "params"}


def _plain(value: Any) -> Setting:
    if isinstance(value, torch.Tensor):
        number: float = value.item()
        return number
    if isinstance(value, (tuple, list)):
        return tuple(float(_plain(item)) for item in value)  # type: ignore[arg-type]
    plain: Setting = value
    return plain


def is_check_due(step: int) -> bool:
    """Whether a recording checks this step by replaying it: step 0 and the powers of four.

    Most mistakes show at once, and the cost of the checks vanishes beside a long training.

    >>> [step for step in range(100) if is_check_due(step)]
    [0, 1, 4, 16, 64]
    """
    if step == 0:
        return True
    is_power_of_two = step.bit_count() == 1
    return is_power_of_two and step.bit_length() % 2 == 1
