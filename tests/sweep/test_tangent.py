"""The tangent sweep: the derivative of the trained state by a group's weight; DIT's transpose."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import backtrail
from backtrail.curvature.policies import Curvature
from backtrail.errors import NeverTrainedOn
from backtrail.methods.retrain.removal import RemovedGroup, changed_state
from backtrail.optim import flatten
from backtrail.optim.slopes import UpdateDerivative
from backtrail.queries import gradients
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.rules import Rules
from backtrail.sweep.tangent import DualState
from backtrail.tree import Tree, each
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
COUPLED_OR_CLIPPED = [
    "adamw",
    "batchnorm, adamw",
    "accumulation, batchnorm",
    "penalty",
    "clip norm",
    "batchnorm, skipped",
]


def sweep_to_end(run: Run, rules: Rules, group: list[int] = GROUP) -> DualState:
    """The trained state and its tangent by a removal."""
    *_, (number, end) = RemovedGroup.of(run, group).sweep(run.steps, rules)
    assert number == run.steps
    return end


def flat_tangent(run: Run, dual: DualState) -> Tensor:
    """The tangent of every floating-point entry of the state_dict, in its order."""
    tangents = dual.tangent.params | dual.tangent.buffers
    # A tied parameter is twice in the state_dict, and has one name here.
    names = {id(p): name for name, p in run.task.model.named_parameters()}
    flat: list[Tensor] = []
    for key, tensor in run.task.model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tangent = tangents.get(names.get(id(tensor), key), torch.zeros_like(tensor))
            flat.append(tangent.detach().flatten())
    return torch.cat(flat)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sweep_is_the_derivative_of_training(case: Case, tmp_path: Path) -> None:
    """Every parameter and running statistic, against training with a group lighter and heavier."""
    run = recorded_run(case.name, tmp_path)
    truth = change_by_removal(case, GROUP)
    computed = flat_tangent(run, sweep_to_end(run, EXACT))
    error = (computed - truth).abs().max() / truth.abs().max()
    assert truth.abs().max() > 0
    assert error <= 1e-6


@pytest.mark.parametrize("curvature", POLICIES, ids=str)
@pytest.mark.parametrize("name", COUPLED_OR_CLIPPED)
def test_it_is_the_transpose_of_the_adjoint_sweep(
    name: str, curvature: Curvature, tmp_path: Path
) -> None:
    """A query's tangent is the sum of the group's influences on it, under the same rules."""
    slope: UpdateDerivative = backtrail.Secant() if name == "adamw" else backtrail.Tangent()
    run = recorded_run(name, tmp_path)
    queries = standard_queries()
    end = sweep_to_end(run, Rules(curvature, slope))
    _, by_params, by_buffers = gradients(
        queries,
        run.task,
        params=end.state.params,
        buffers=end.state.buffers,
        trained=run.trained,
    )
    tangents = end.tangent.params | end.tangent.buffers
    products: list[Tensor] = []
    for key, gradient in (by_params | by_buffers).items():
        products.append(gradient.flatten(1) @ tangents[key].flatten())
    influence = backtrail.DIT(curvature=curvature, slope=slope).attribute(run, queries)
    expected = torch.from_numpy(influence.total()[:, 0, GROUP].sum(1))
    tolerance = 1e-6 if curvature.product == "difference" else 1e-11
    torch.testing.assert_close(torch.stack(products).sum(0), expected, rtol=tolerance, atol=0)


def test_long_parameters_are_pushed_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of three entries cut every parameter, and change nothing."""
    run = recorded_run("adamw", tmp_path)
    whole = flat_tangent(run, sweep_to_end(run, EXACT))
    monkeypatch.setattr(flatten, "CHUNK_ENTRIES", {"cpu": 3})
    in_chunks = flat_tangent(run, sweep_to_end(run, EXACT))
    torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-15)


def test_before_the_first_visit_nothing_changes(tmp_path: Path) -> None:
    """The sweep starts at the state of the first visit; a sample that was never seen is refused."""
    run = recorded_run("twice in a batch", tmp_path)
    (first, at_first), *_ = RemovedGroup.of(run, [4]).sweep(run.steps, EXACT)
    assert first == 2
    assert all((tensor == 0).all() for tensor in at_first.tangent.params.values())
    with pytest.raises(NeverTrainedOn, match="Sample 8 was never trained on"):
        RemovedGroup.of(run, [8])


def test_a_real_step_differs_from_its_first_order_prediction(tmp_path: Path) -> None:
    """At the first visit SGD is linear in the weights and Adam is not; later neither is."""
    gaps: dict[str, list[float]] = {"momentum": [], "adamw": []}
    for name, relative_gaps in gaps.items():
        run = recorded_run(name, tmp_path)
        group = RemovedGroup.of(run, GROUP)
        states = [dual for _, dual in group.sweep(run.steps, EXACT)]
        for step in range(run.steps):
            gap, size = group.linearity_gap(step, states[step], states[step + 1])
            relative_gaps.append(gap / size)
    assert gaps["momentum"][0] < 1e-12
    assert gaps["adamw"][0] > 0.01
    assert min(gaps["momentum"][1:] + gaps["adamw"][1:]) > 0.001


def test_what_is_a_square_stays_one(tmp_path: Path) -> None:
    """Second moments and running variances are changed to first order, and never below zero."""
    run = recorded_run("batchnorm, adamw", tmp_path)
    dual = sweep_to_end(run, EXACT)
    tiny = changed_state(DualState(dual.state, scaled(dual.tangent, 1e-6)))
    huge = changed_state(DualState(dual.state, scaled(dual.tangent, 1e6)))
    for state in (tiny, huge):
        squares = [tree["exp_avg_sq"] for tree in state.moments.values()]
        squares.append(state.buffers["1.running_var"])
        for square in squares:
            assert (square >= 0).all()
            assert square.isfinite().all()
    before = dual.state.buffers["1.running_var"]
    slope = (tiny.buffers["1.running_var"] - before) / 1e-6
    expected = dual.tangent.buffers["1.running_var"]
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-9)


def scaled(tangent: State, factor: float) -> State:
    """A tangent times a number."""

    def times(tree: Tree) -> Tree:
        return each(lambda tensor: factor * tensor, tree)

    moments = {name: times(tree) for name, tree in tangent.moments.items()}
    return State(times(tangent.params), times(tangent.buffers), moments)


def test_under_autocast_the_states_are_those_of_the_training(tmp_path: Path) -> None:
    """Its derivative is that of the gradient without autocast, along the states of the training."""
    loop = Loop.of(mlp())
    with loop.recorder(tmp_path / "run", checkpoints=backtrail.Only([0])) as recorder:
        autocast_training(loop)(recorder.watch)
    run = backtrail.open_run(tmp_path / "run", loop.task())
    dual = sweep_to_end(run, EXACT)
    end = dual.state
    for name, tensor in run.state(run.steps).params.items():
        torch.testing.assert_close(end.params[name], tensor, rtol=0, atol=0)
    loss = backtrail.Loss(run.task.data, aggregate="mean")
    _, by_params, _ = gradients(
        loss, run.task, params=end.params, buffers=end.buffers, trained=run.trained
    )
    products = [(by_params[name][0] * dual.tangent.params[name]).sum() for name in by_params]
    total = float(torch.stack(products).sum())
    influence = backtrail.DIT().attribute(run, loss).total()[0, 0, GROUP].sum()
    assert total == pytest.approx(float(influence), rel=1e-3)
