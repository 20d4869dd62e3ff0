"""The derivative of an update equals finite differences, however parameters are cut into chunks."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import backtrail
import backtrail.optim.jacobian
from backtrail.optim.flatten import CHUNK_ENTRIES, flat_chunks
from backtrail.optim.jacobian import (
    GRADIENT,
    PARAMETER,
    Diagonals,
    FlatUpdate,
    jacobian,
    pull_update,
)
from backtrail.step.optimizers import COUNTS, RULES
from backtrail.step.state import State
from backtrail.step.update import Update
from backtrail.tree import Tree, each
from tests.step.updates import started

SHAPES = {"a": (3, 2), "b": (3,), "c": (), "d": (2, 2)}


def diagonals_of(update: Update, state: State, grad: Tensor) -> Diagonals:
    """The Jacobian at all entries of the parameter."""
    (chunk,) = flat_chunks(update, state, {"w": grad})
    return jacobian(update, state, {"w": grad}, chunk=chunk)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("kind", RULES)
def test_the_jacobian_equals_finite_differences(kind: str, steps: int) -> None:
    """Every output by every input, also at the first step of a fresh optimizer."""
    update, state, grad = started(kind, steps)
    diagonals = diagonals_of(update, state, grad)
    after = update(state, {"w": grad})
    outputs = [PARAMETER, *(k for k, m in after.moments["w"].items() if m.shape == grad.shape)]
    sources = {source for _, source in diagonals}
    assert {PARAMETER, GRADIENT} <= sources
    for source in sources:
        numeric = differences(update, state, grad, source)
        for output in outputs:
            exact = diagonals.get((output, source), torch.zeros(6, dtype=torch.float64))
            torch.testing.assert_close(exact, numeric[output], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("kind", RULES)
def test_a_learning_rate_of_zero_has_a_derivative(kind: str, steps: int) -> None:
    """As at the first step of a warm-up: the moments change, and most parameters do not."""
    update, state, grad = started(kind, steps)
    update = replace(update, settings=(update.settings[0] | {"lr": 0.0},))
    diagonals = diagonals_of(update, state, grad)
    for source in {source for _, source in diagonals}:
        numeric = differences(update, state, grad, source)
        for output, truth in numeric.items():
            exact = diagonals.get((output, source), torch.zeros(6, dtype=torch.float64))
            torch.testing.assert_close(exact, truth, rtol=1e-5, atol=1e-7)


def differences(update: Update, state: State, grad: Tensor, source: str) -> dict[str, Tensor]:
    """Central differences of all outputs; every input entry moves by a millionth of itself."""
    found = []
    inputs = {PARAMETER: state.params["w"], GRADIENT: grad} | state.moments.get("w", {})
    size = 1e-6 * inputs[source].abs() + 1e-12
    for sign in (1.0, -1.0):
        params = dict(state.params)
        moments = {name: dict(tree) for name, tree in state.moments.items()}
        moved = grad
        match source:
            case "parameter":
                params["w"] = params["w"] + sign * size
            case "gradient":
                moved = grad + sign * size
            case key:
                moments["w"][key] = moments["w"][key] + sign * size
        after = update(State(params, {}, moments), {"w": moved})
        found.append({PARAMETER: after.params["w"]} | after.moments["w"])
    return {
        key: (found[0][key] - found[1][key]) / (2 * size)
        for key in found[0]
        if found[0][key].shape == grad.shape
    }


@pytest.mark.parametrize("kind", RULES)
def test_the_counts_of_a_new_optimizer_are_in_float64(kind: str) -> None:
    """They are those that torch makes where float64 is the default, which the process keeps."""
    update, state, grad = started(kind, 0)
    inputs = {PARAMETER: state.params["w"], GRADIENT: grad}
    flat = FlatUpdate(replace(update, groups=((PARAMETER,),)), inputs, {})
    moments = flat.start(inputs)
    counts = {key: tensor.dtype for key, tensor in moments.items() if key in COUNTS}
    assert set(counts.values()) <= {torch.float64}

    def step(before: Tree) -> Tree:
        after = flat.outputs(inputs | before)
        return {key: tensor for key, tensor in after.items() if key not in COUNTS}

    from_ours = step(moments)
    torch.set_default_dtype(torch.float64)
    try:
        from_torchs = step({})
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(from_ours, from_torchs, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "kind", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax"]
)
def test_entries_that_never_moved_have_a_finite_derivative(kind: str) -> None:
    """A dead unit's second moment stays zero, and no NaN reaches its neighbours."""
    update, state, grad = started(kind, 0)
    for _ in range(3):
        dead = grad.clone()
        dead[2] = 0.0
        diagonals = diagonals_of(update, state, dead)
        assert all(torch.isfinite(entry).all() for entry in diagonals.values()), (kind, diagonals)
        state = update(state, {"w": dead})


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"])
def test_entries_whose_gradients_cancel_have_the_derivative_of_the_limit(
    kind: str, steps: int
) -> None:
    """Gradients of several samples may add up to zero, and change it all the same."""
    update, state, grad = started(kind, 0)
    update = replace(update, settings=(update.settings[0] | {"eps": 1e-3},))
    zero = grad.clone()
    zero[2] = 0.0
    for _ in range(steps - 1):
        state = update(state, {"w": zero})
    diagonals = diagonals_of(replace(update, cancelled={"w": zero == 0}), state, zero)
    size = 1e-9
    up = zero.clone()
    up[2] = size
    down = zero.clone()
    down[2] = -size
    above = update(state, {"w": up})
    below = update(state, {"w": down})
    truth = (above.params["w"] - below.params["w"])[2] / (2 * size)
    assert diagonals[PARAMETER, GRADIENT][2] == pytest.approx(float(truth), rel=1e-5)
    for key in ("exp_avg", "momentum_buffer"):
        if key in above.moments["w"]:
            change = above.moments["w"][key] - below.moments["w"][key]
            truth = change[2] / (2 * size)
            assert diagonals[key, GRADIENT][2] == pytest.approx(float(truth), rel=1e-5)


def test_how_parameters_are_cut_into_chunks_changes_no_cotangent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several shapes, groups and step counts: chunks of 4 entries give what whole parameters do."""
    draw = torch.Generator().manual_seed(1)

    def tree(*leading: int) -> Tree:
        return {
            n: torch.rand((*leading, *shape), generator=draw, dtype=torch.float64)
            for n, shape in SHAPES.items()
        }

    settings = started("AdamW", 1)[0].settings[0]
    update = Update("AdamW", (("a", "b"), ("c", "d")), (settings, settings | {"lr": 0.5}))
    state = update(
        update(State(tree()), {name: grad for name, grad in tree().items() if name != "b"}), tree()
    )
    grads, after, first, second = tree(), tree(3), tree(3), tree(3)

    def pulled() -> tuple[Tree, dict[str, Tree], Tree]:
        params = each(torch.clone, after)
        moments = {
            name: {"exp_avg": first[name].clone(), "exp_avg_sq": second[name].clone()}
            for name in after
        }
        slopes = (
            (chunk, jacobian(update, state, grads, chunk=chunk))
            for chunk in flat_chunks(update, state, grads)
        )
        return params, *pull_update(slopes, grads, params=params, moments=moments)

    whole = pulled()
    assert (
        len(list(flat_chunks(update, state, grads))) == 3
    )  # b is a step younger than a; c and d have another rate
    monkeypatch.setitem(CHUNK_ENTRIES, "cpu", 4)
    monkeypatch.setattr(backtrail.optim.jacobian, "BLOCK_BYTES", 40)
    assert len(list(flat_chunks(update, state, grads))) == 5
    torch.testing.assert_close(pulled(), whole, rtol=0, atol=0)


def test_nothing_is_left_behind() -> None:
    """A sweep takes thousands of derivatives: what each of them kept would fill the memory."""
    update, state, grad = started("AdamW", 4)

    def tensors_after_another() -> int:
        diagonals_of(update, state, grad)
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    tensors_after_another()
    assert tensors_after_another() == tensors_after_another()


@pytest.mark.parametrize("frozen", [0, 2])
def test_cancelled_gradients_are_found_at_a_parameters_first_step(
    frozen: int, tmp_path: Path
) -> None:
    """Of two absolute errors of opposite sign, also where the bias is trained from later on."""
    data = TensorDataset(torch.tensor([[1.0], [2.0]]), torch.tensor([5.0, -5.0]))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (outputs[:, 0] - batch[1]).abs()

    task = backtrail.Task(model, data, loss=loss)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for step in range(4):
            model.bias.requires_grad_(step >= frozen)
            for batch in recorder.watch(DataLoader(data, batch_size=2)):
                loss(model(batch[0]), batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    run.find_cancelled()
    assert [name for name, mask in run.transition(0).update.cancelled.items() if mask.all()] == [
        "bias"
    ]
