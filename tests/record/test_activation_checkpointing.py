"""Models with activation checkpointing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
import torch.utils.checkpoint as recompute
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import backtrail
from backtrail.task.activation_checkpointing import computed_once, uses_checkpointing
from tests.loops import CLASSES, FEATURES, Loop, recorded_loop


class Net(nn.Module):
    """Two layers with dropout between them, whose activations may be checkpointed."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(5)
        nn.Module.__init__(self)
        self.way = way
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs `[row, feature]` to logits `[row, class]`."""
        x = self.first(x)
        if self.way == "once":
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.way == "reentrant"))


def influence(way: str, path: Path) -> np.ndarray:
    """Return the influence of a training that draws the same random numbers in every way."""
    loop = Loop.of(Net(way).double())
    loop.data.tensors = (loop.data.tensors[0].double(), loop.data.tensors[1])
    torch.manual_seed(1)
    run = recorded_loop(loop, path)
    return backtrail.DIT().attribute(run, backtrail.Loss(loop.data, samples=[0, 3])).values()


def implementations() -> tuple[object, object]:
    """Return torch's two implementations, or what replaces them at the moment."""
    return recompute.CheckpointFunction, recompute._checkpoint_without_reentrant_generator


TORCHS_OWN = implementations()


@pytest.mark.parametrize("way", ["reentrant", "later"])
def test_they_are_recorded_and_attributed_like_others(way: str, tmp_path: Path) -> None:
    """Both kinds of checkpointing give the influence of a model without, and stay in place."""
    found = influence(way, tmp_path / "twice")
    np.testing.assert_allclose(
        found, influence("once", tmp_path / "once"), rtol=0, atol=1e-12 * np.abs(found).max()
    )
    assert implementations() == TORCHS_OWN


class Calling(nn.Module):
    """A module whose forward calls a function that it holds."""

    def __init__(self, call: Callable[..., Any]) -> None:
        nn.Module.__init__(self)
        self.inner = nn.Linear(3, 3)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        """Call the function."""
        return self.call(self, x)


def test_a_model_without_it_is_called_with_torch_untouched() -> None:
    """A model without checkpointing is called with torch's own implementations."""
    data = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.randint(0, 2, (4,)))
    task = backtrail.classification(nn.Linear(3, 2), data)
    assert not task.uses_checkpointing
    untouched: list[bool] = []
    model = task.binding.model
    # Hooked after the search, which would find torch's implementations in the hook.
    hook = model.register_forward_hook(lambda *_: untouched.append(implementations() == TORCHS_OWN))
    task.losses(task.parameters(), {}, task.batch([0, 1]))
    hook.remove()
    assert untouched == [True]


def own_helper(module: nn.Module, x: Tensor) -> Any:
    """Call a module with checkpointing."""
    return checkpoint(module, x, use_reentrant=False)


class Switchable(nn.Module):
    """A module with a switch for checkpointing, which is off."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner = nn.Linear(3, 3)

    def switch(self) -> None:
        """Switch checkpointing on, as transformers' `gradient_checkpointing_enable` does."""
        self.call = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Any:
        """Apply the inner layer."""
        return self.inner(x)


def switched() -> nn.Module:
    """Make a module whose forward reads the attribute that the switch sets."""

    class Reading(Switchable):
        def forward(self, x: Tensor) -> Any:
            """Use the attribute, if it is set."""
            return self.call(self.inner, x) if hasattr(self, "call") else self.inner(x)

    model = Reading()
    model.switch()
    return model


def in_the_function(module: Any, x: Tensor) -> Any:
    """Import checkpointing in the function that uses it."""
    from torch.utils.checkpoint import checkpoint_sequential  # noqa: PLC0415 - what is tested

    return checkpoint_sequential(nn.Sequential(module.inner), 1, x, use_reentrant=False)


class Unreadable(nn.Module):
    """A module with a property that must not be read, and a list that contains itself."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner = nn.Linear(3, 3)
        self.loop: list[Any] = []
        self.loop.append(self.loop)

    @property
    def costly(self) -> Tensor:
        """Raise an error."""
        raise MemoryError

    def forward(self, x: Tensor) -> Any:
        """Refer to both, to a closure and to a recursion."""

        def again(count: int) -> Any:
            return again(count - 1) if count else self.inner(x)

        return again(2) if self.loop else self.costly


WITH: dict[str, Callable[[], nn.Module]] = {
    "in its forward": lambda: Net("later"),
    "by a chain of modules": lambda: Calling(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.inner, x, use_reentrant=False)
    ),
    "by another name": lambda: Calling(
        lambda m, x: recompute.checkpoint(m.inner, x, use_reentrant=True)
    ),
    "by a helper": lambda: Calling(lambda m, x: own_helper(m.inner, x)),
    "by an attribute": switched,
    "imported in the function": lambda: Calling(in_the_function),
    "deep inside": lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(Calling(own_helper))),
    "torch's own wrapper": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3))),
}
WITHOUT: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LSTM(3, 3)),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2), 1, enable_nested_tensor=False
    ),
    "it could be switched on": Switchable,
    "a property and a recursion": Unreadable,
}


@pytest.mark.parametrize("name", WITH)
def test_its_use_is_found(name: str) -> None:
    """Checkpointing is found however the code refers to it."""
    assert uses_checkpointing(WITH[name]())


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_else_is_taken_for_it(name: str) -> None:
    """Modules without checkpointing are recognised without a call."""
    assert not uses_checkpointing(WITHOUT[name]())


def test_a_function_beside_the_model_may_use_it() -> None:
    """Checkpointing is found in `predict` of a task, too."""
    model = nn.Linear(3, 3)
    assert not uses_checkpointing(model, lambda model, batch: model(batch[0]))
    assert uses_checkpointing(model, lambda model, batch: own_helper(model, batch[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_threads_keep_torchs_own(*, reentrant: bool) -> None:
    """Other threads compute twice, as without the context, which can be nested."""
    calls: list[Tensor] = []

    def inner(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin()

    def train() -> None:
        x = torch.ones(2, requires_grad=True)
        checkpoint(inner, x, use_reentrant=reentrant).sum().backward()

    with computed_once():
        with computed_once():
            train()
        assert len(calls) == 1
        other = Thread(target=train)
        other.start()
        other.join()
        assert len(calls) == 3
        train()
        assert len(calls) == 4
    assert implementations() == TORCHS_OWN
    train()
    assert len(calls) == 6
