"""The update as a function: same numbers as torch.optim, and a Jacobian that equals finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whence.errors import UnsupportedOptimizer
from whence.replay.state import State, settings_of
from whence.replay.update import GRADIENT, PARAMETER, SUPPORTED, Update, supported, tensors_of

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.1, "centered": True, "momentum": 0.5},
    "ASGD": {"lr": 0.1, "t0": 1.0},
}


def started(kind: str, steps: int) -> tuple[Update, State, Tensor]:
    """An optimizer after some steps on random gradients: its update, its state, and the next gradient."""
    draw = torch.Generator().manual_seed(5)
    parameter = nn.Parameter(torch.randn(6, generator=draw, dtype=torch.float64))
    optimizer = SUPPORTED[kind]([parameter], **SETTINGS.get(kind, {"lr": 0.1}))
    for _ in range(steps):
        parameter.grad = torch.randn(6, generator=draw, dtype=torch.float64)
        optimizer.step()
    grad = torch.randn(6, generator=draw, dtype=torch.float64)
    moments = {"w": tensors_of(optimizer.state[parameter])} if steps else {}
    state = State(
        {"w": parameter.detach().clone()}, {}, {n: {k: t.clone() for k, t in m.items()} for n, m in moments.items()}
    )
    return Update(kind, (("w",),), (settings_of(optimizer.param_groups[0]),)), state, grad


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_jacobian_equals_finite_differences(kind: str, steps: int) -> None:
    """Every output by every input, also at the first step of a fresh optimizer."""
    update, state, grad = started(kind, steps)
    entries = update.jacobian(state, {"w": grad}).entries["w"]
    after = update(state, {"w": grad})
    outputs = [PARAMETER, *(k for k, m in after.moments["w"].items() if m.shape == grad.shape)]
    sources = {source for _, source in entries}
    assert {PARAMETER, GRADIENT} <= sources
    for source in sources:
        numeric = differences(update, state, grad, source)
        for output in outputs:
            exact = entries.get((output, source), torch.zeros(6, dtype=torch.float64))
            torch.testing.assert_close(exact, numeric[output], rtol=1e-5, atol=1e-7)


def differences(update: Update, state: State, grad: Tensor, source: str) -> dict[str, Tensor]:
    """Central differences of all outputs, moving every entry of one input by a millionth of itself."""
    found = []
    inputs = {PARAMETER: state.params["w"], GRADIENT: grad} | state.moments.get("w", {})
    size = 1e-6 * inputs[source].abs() + 1e-12
    for sign in (1.0, -1.0):
        params, moments, moved = dict(state.params), {n: dict(t) for n, t in state.moments.items()}, grad
        match source:
            case "parameter":
                params["w"] = params["w"] + sign * size
            case "gradient":
                moved = grad + sign * size
            case key:
                moments["w"][key] = moments["w"][key] + sign * size
        after = update(State(params, {}, moments), {"w": moved})
        found.append({PARAMETER: after.params["w"]} | after.moments["w"])
    return {key: (found[0][key] - found[1][key]) / (2 * size) for key in found[0] if found[0][key].shape == grad.shape}


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax"])
def test_entries_that_never_moved_have_a_finite_derivative(kind: str) -> None:
    """A dead unit's second moment stays zero, and no NaN reaches its neighbours."""
    update, state, grad = started(kind, 0)
    for _ in range(3):
        dead = grad.clone()
        dead[2] = 0.0
        entries = update.jacobian(state, {"w": dead}).entries["w"]
        assert all(torch.isfinite(entry).all() for entry in entries.values()), (kind, entries)
        state = update(state, {"w": dead})


def test_a_stack_of_states_is_updated_like_each_alone() -> None:
    """The update is elementwise, so stacks need no loop."""
    update, state, grad = started("AdamW", 2)
    many = update(state.repeat(3), {"w": torch.stack([grad, -grad, 2 * grad])})
    torch.testing.assert_close(many.params["w"][1], update(state, {"w": -grad}).params["w"], rtol=0, atol=0)


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
