"""The update as a function: for stacks of states too, and only where there is a gradient."""

import torch

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
