"""The update as a function: the same numbers as torch.optim, for stacks too, and only where there is a gradient."""

import pytest
import torch

from backtrail.errors import UnsupportedOptimizer
from backtrail.step.update import supported
from tests.step.updates import started


def test_a_stack_of_states_is_updated_like_each_alone() -> None:
    """The update is elementwise, so stacks need no loop."""
    update, state, grad = started("AdamW", 2)
    many = update(state.repeat(3), {"w": torch.stack([grad, -grad, 2 * grad])})
    torch.testing.assert_close(
        many.params["w"][1], update(state, {"w": -grad}).params["w"], rtol=0, atol=0
    )


def test_parameters_without_gradient_stay(kind: str = "AdamW") -> None:
    """No weight decay touches them."""
    update, state, _ = started(kind, 1)
    assert update(state, {}).params["w"] is state.params["w"]


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "SparseAdam", "Adafactor"])
def test_optimizers_without_a_derivative_are_refused(name: str) -> None:
    """By name and with the reason."""
    with pytest.raises(UnsupportedOptimizer, match=name):
        supported(getattr(torch.optim, name))


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    """It may have another update."""

    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(UnsupportedOptimizer, match="Mine"):
        supported(Mine)
