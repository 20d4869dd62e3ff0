"""The tangent sweep: the derivative of the whole trained state by the weight of a group, and DIT's transpose."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import backtrail
from backtrail.curvature.policies import Curvature
from backtrail.methods.retrain.removal import RemovedGroup, changed_state
from backtrail.optim import flatten
from backtrail.optim.slopes import UpdateDerivative
from backtrail.queries import gradients
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.rules import Rules
from backtrail.sweep.tangent import DualState
from backtrail.tree import each
from tests.cases import CASES, Case
from tests.loops import Loop, autocast_training, mlp
from tests.oracles.group import change_by_removal
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

GROUP = [0, 4]
EXACT = Rules(backtrail.Hessian(), backtrail.Tangent())
POLICIES: list[Curvature] = [
    kind(product=product)
    for kind in (
        backtrail.Hessian,
        backtrail.GaussNewton,
        backtrail.EmpiricalFisher,
        backtrail.Zero,
    )
    for product in ("autograd", "difference")
]
PARTED = [
    "adamw",
    "batchnorm, adamw",
    "accumulation, batchnorm",
    "penalty",
    "clip norm",
    "batchnorm, skipped",
]


def swept(run: Run, rules: Rules, group: list[int] = GROUP) -> DualState:
    """The trained state and its change by a removal."""
    *_, (number, found) = RemovedGroup.of(run, group).sweep(run.steps, rules)
    assert number == run.steps
    return found


def flat(run: Run, change: DualState) -> Tensor:
    """The change of every floating entry of the state_dict."""
    tree = change.tangent.params | change.tangent.buffers
    names = {id(p): name for name, p in run.task.model.named_parameters()}
    held = {
        key: (names.get(id(t), key), t)
        for key, t in run.task.model.state_dict(keep_vars=True).items()
    }
    found = [
        tree.get(name, torch.zeros_like(t)) for name, t in held.values() if t.is_floating_point()
    ]
    return torch.cat([tensor.detach().flatten() for tensor in found])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sweep_is_the_derivative_of_training(case: Case, tmp_path: Path) -> None:
    """Every parameter and running statistic, against training again with a group a little lighter and heavier."""
    run, truth = recorded_run(case.name, tmp_path), change_by_removal(case, GROUP)
    error = (flat(run, swept(run, EXACT)) - truth).abs().max() / truth.abs().max()
    assert truth.abs().max() > 0
    assert error <= 1e-6


@pytest.mark.parametrize("curvature", POLICIES, ids=str)
@pytest.mark.parametrize("name", PARTED)
def test_it_is_the_transpose_of_the_adjoint_sweep(
    name: str, curvature: Curvature, tmp_path: Path
) -> None:
    """What it changes in a query is the sum of the influences of the group, under the same rules."""
    slope: UpdateDerivative = backtrail.Secant() if name == "adamw" else backtrail.Tangent()
    run = recorded_run(name, tmp_path)
    found = swept(run, Rules(curvature, slope))
    end = found.state
    _, *slopes = gradients(
        standard_queries(), run.task, params=end.params, buffers=end.buffers, trained=run.trained
    )
    change = found.tangent.params | found.tangent.buffers
    pairs = [
        (tensor.flatten(1), change[key].flatten())
        for tree in slopes
        for key, tensor in tree.items()
    ]
    expected = (
        backtrail.DIT(curvature=curvature, slope=slope)
        .attribute(run, standard_queries())
        .total()[:, 0, GROUP]
        .sum(1)
    )
    total = torch.stack([left @ right for left, right in pairs]).sum(0)
    tolerance = 1e-6 if curvature.product == "difference" else 1e-11
    torch.testing.assert_close(total, torch.from_numpy(expected), rtol=tolerance, atol=0)


def test_long_parameters_are_pushed_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of three entries cut every parameter, and change nothing."""
    run = recorded_run("adamw", tmp_path)
    whole = flat(run, swept(run, EXACT))
    monkeypatch.setattr(flatten, "CHUNK_ENTRIES", {"cpu": 3})
    torch.testing.assert_close(flat(run, swept(run, EXACT)), whole, rtol=1e-12, atol=1e-15)


def test_before_the_first_visit_nothing_changes(tmp_path: Path) -> None:
    """The sweep starts at the state of the first visit; of a group never visited, at the end."""
    run = recorded_run("twice in a batch", tmp_path)
    (first, begun), *_ = RemovedGroup.of(run, [4]).sweep(run.steps, EXACT)
    assert first == 2
    assert all((tensor == 0).all() for tensor in begun.tangent.params.values())
    ((last, only),) = RemovedGroup.of(run, [8]).sweep(run.steps, EXACT)
    assert last == run.steps
    assert all((tensor == 0).all() for tensor in only.tangent.params.values())


def test_a_real_step_bends_away_from_first_order(tmp_path: Path) -> None:
    """At the first visit SGD is linear in the weights and Adam is not; later neither is."""
    bends = {}
    for name in ("momentum", "adamw"):
        run = recorded_run(name, tmp_path)
        group = RemovedGroup.of(run, GROUP)
        states = [now for _, now in group.sweep(run.steps, EXACT)]
        found = [group.linearity_gap(step, *states[step : step + 2]) for step in range(run.steps)]
        bends[name] = [off / far for off, far in found]
    assert bends["momentum"][0] < 1e-12
    assert bends["adamw"][0] > 0.01
    assert min(bends["momentum"][1:] + bends["adamw"][1:]) > 0.001


def test_what_is_a_square_stays_one(tmp_path: Path) -> None:
    """Second moments and running variances are moved to first order, and never below zero."""
    run = recorded_run("batchnorm, adamw", tmp_path)
    now = swept(run, EXACT)
    tiny, huge = (
        changed_state(DualState(now.state, scaled(now.tangent, size))) for size in (1e-6, 1e6)
    )
    for state in (tiny, huge):
        squares = [tree["exp_avg_sq"] for tree in state.moments.values()] + [
            state.buffers["1.running_var"]
        ]
        assert all(
            bool((square >= 0).all()) and bool(square.isfinite().all()) for square in squares
        )
    before, change = now.state.buffers["1.running_var"], now.tangent.buffers["1.running_var"]
    torch.testing.assert_close(
        (tiny.buffers["1.running_var"] - before) / 1e-6, change, rtol=1e-4, atol=1e-9
    )


def scaled(change: State, size: float) -> State:
    """A change, larger."""
    params, buffers, *moments = (
        each(lambda tensor: size * tensor, tree)
        for tree in (change.params, change.buffers, *change.moments.values())
    )
    return State(params, buffers, dict(zip(change.moments, moments, strict=True)))


def test_under_autocast_the_states_are_those_of_the_training(tmp_path: Path) -> None:
    """The change is that of the plain gradient along the trained states; the case has the states to compare with."""
    loop = Loop.of(mlp())
    with loop.recorder(tmp_path / "run", checkpoints=backtrail.Only([0])) as recorder:
        autocast_training(loop)(recorder.watch)
    run = backtrail.open_run(tmp_path / "run", loop.task())
    found = swept(run, EXACT)
    for name, tensor in run.state(run.steps).params.items():
        torch.testing.assert_close(found.state.params[name], tensor, rtol=0, atol=0)
    loss, end = backtrail.Loss(run.task.data, aggregate="mean"), found.state
    _, slopes, _ = gradients(
        loss, run.task, params=end.params, buffers=end.buffers, trained=run.trained
    )
    total = sum(
        float((tensor[0] * found.tangent.params[name]).sum()) for name, tensor in slopes.items()
    )
    influence = backtrail.DIT().attribute(run, loss).total()[0, 0, GROUP].sum()
    assert total == pytest.approx(float(influence), rel=1e-3)
