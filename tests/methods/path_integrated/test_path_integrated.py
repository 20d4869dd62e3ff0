"""PathIntegrated equals a plain loop with weighted losses, resumes, refuses, and finds culprits."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import BadSetting, DifferentInfluence, ReplayMismatch
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.dit.checkpoint import CotangentStore
from backtrail.methods.path_integrated.draws import Draws, draw_weights
from backtrail.run.run import Run
from tests.cases import (
    ADAMW,
    BATCHES,
    CASES_BY_NAME,
    ROWS,
    SGD,
    Case,
    Weights,
    one_group,
    rows,
    train,
    with_dropout,
)
from tests.interruption import Interrupted
from tests.oracles.nudge import assert_exact, observe
from tests.oracles.path_integrated import path_integrated
from tests.oracles.weighted_adamw import queries_after
from tests.recorded_runs import recorded_case, recorded_run
from tests.standard_queries import standard_losses, standard_queries

FLOOR = 0.01
CASES = [
    CASES_BY_NAME["momentum"],
    CASES_BY_NAME["adamw"],
    CASES_BY_NAME["clip norm"],
    CASES_BY_NAME["penalty"],
    CASES_BY_NAME["twice in a batch"],
    CASES_BY_NAME["short batches"],
    CASES_BY_NAME["batchnorm, sgd"],
    CASES_BY_NAME["accumulation, batchnorm"],
    CASES_BY_NAME["batchnorm, skipped"],
    Case("dropout, sgd", one_group(SGD, lr=0.3, momentum=0.9), model=with_dropout),
    Case("dropout, adamw", one_group(ADAMW, lr=0.01), model=with_dropout),
]


def method(**settings: Any) -> backtrail.PathIntegrated:
    """Make a method with two re-runs, unless told otherwise."""
    return backtrail.PathIntegrated(**({"runs": 2, "floor": FLOOR} | settings))


def draws_of(run: Run, made: backtrail.PathIntegrated) -> Draws:
    """Draw the weights that the method draws for a run."""
    return draw_weights(
        run.samples, runs=made.runs, floor=made.floor, share=made.share, seed=made.seed
    )


def observing(states: Sequence[int]) -> Callable[[Case, Weights], np.ndarray]:
    """Return what trains in plain PyTorch, and evaluates the standard queries at some states."""

    def trained(case: Case, weights: Weights) -> np.ndarray:
        return observe(case, standard_losses, states, weights)

    return trained


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_it_equals_nudging_weighted_losses(case: Case, share: float, tmp_path: Path) -> None:
    """The influence of every slot is the mean over trainings with weighted losses."""
    run = recorded_case(case, tmp_path)
    states = [run.steps - 1, run.steps]
    made = method(share=share)
    found = made.attribute(run, standard_queries(), observed_at=states)
    draws = draws_of(run, made)
    truth = path_integrated(case, observing(states), draws.weights, draws.drawn, FLOOR)
    assert_exact(found.values(), truth)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_batchnorm_with_adamw_equals_autograd_through_the_training(
    share: float, tmp_path: Path
) -> None:
    """It equals autograd through weighted trainings that are written out, to 1e-10."""
    made = method(share=share)
    run = recorded_run("batchnorm, adamw", tmp_path)
    found = made.attribute(run, standard_queries(), observed_at=[4, 5]).values()
    draws = draws_of(run, made)
    truth = np.zeros_like(found)
    for weights, drawn in zip(draws.weights, draws.drawn, strict=True):
        for column, state in enumerate((4, 5)):
            factors = [torch.ones(len(batch)).double().requires_grad_() for batch in BATCHES]
            of_slots = [torch.tensor(weights[batch]) for batch in BATCHES]
            both = [factor * weight for factor, weight in zip(factors, of_slots, strict=True)]
            for query, value in enumerate(queries_after(state, both)):
                used = factors[:state]
                slopes = torch.autograd.grad(value, used, retain_graph=True)
                for step, slope in enumerate(slopes):
                    share_of_draw = (drawn / draws.counts)[BATCHES[step]]
                    truth[query, column, step] -= share_of_draw * slope.numpy()
    truth *= np.log(1 / FLOOR)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10 * np.abs(truth).max())


def with_average(states: Sequence[int]) -> Callable[[Case, Weights], np.ndarray]:
    """Return the same, with the queries evaluated at an exponential average of the weights."""

    def trained(case: Case, weights: Weights) -> np.ndarray:
        model = case.built()
        average = deepcopy(model)
        found = []
        for state in train(case, model, rows(), weights):
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 0.3)
                if state in states:
                    found.append(standard_losses(average).numpy())
        return np.stack(found, axis=1)

    return trained


def test_averaged_queries_read_the_averages_of_the_re_runs(tmp_path: Path) -> None:
    """Queries of an average of the weights read that of every re-run."""
    case = CASES_BY_NAME["momentum"]
    run = recorded_case(case, tmp_path)
    queries = backtrail.Averaged(standard_queries(), decay=0.7)
    found = method().attribute(run, queries, observed_at=[3, 5])
    draws = draws_of(run, method())
    truth = path_integrated(case, with_average([3, 5]), draws.weights, draws.drawn, FLOOR)
    assert_exact(found.values(), truth)


@pytest.mark.parametrize(
    "base",
    [
        backtrail.DIT(curvature=backtrail.GaussNewton()),
        backtrail.DIT(curvature=backtrail.Zero()),
        backtrail.DIT(curvature=backtrail.Hessian("difference")),
        backtrail.DIT(slope=backtrail.Secant()),
        backtrail.DIT(memory=10**7, chunk=1),
    ],
    ids=repr,
)
def test_the_base_decides_how_re_runs_are_swept(base: backtrail.DIT, tmp_path: Path) -> None:
    """It equals `DIT` with the same settings on a recording of each weighted training."""
    case = CASES_BY_NAME["adamw"]
    made = method(base=base)
    run = recorded_case(case, tmp_path)
    found = made.attribute(run, standard_queries(), observed_at=[3, 5]).values()
    draws = draws_of(run, made)
    mean = np.zeros(())
    for number, weights in enumerate(draws.weights):
        recorded = recorded_with_weights(case, weights, tmp_path / str(number))
        swept = base.attribute(recorded, standard_queries(), observed_at=[3, 5]).values()
        mean = mean + np.log(1 / FLOOR) * swept / 2
    np.testing.assert_allclose(found, mean, rtol=0, atol=1e-6 * np.abs(mean).max())


def recorded_with_weights(case: Case, weights: np.ndarray, path: Path) -> Run:
    """Record the training whose loss terms are multiplied by the weights of their rows."""
    model = case.built()
    inputs, labels = rows().tensors
    data = TensorDataset(inputs, labels, torch.tensor(weights))

    def loss(outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        return cross_entropy(outputs, batch[1], reduction="none") * batch[2]

    task = backtrail.Task(model, data, loss=loss)
    optimizer = case.optimizer(model)
    with backtrail.Recorder(path, task, optimizer) as recorder:
        batches = DataLoader(data, batch_sampler=[list(batch) for batch in case.batches])
        for batch in recorder.watch(batches):
            loss(model(batch[0]), batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return backtrail.open_run(path, task)


def size(model: nn.Module) -> Tensor:
    """Return the squared norm of a linear layer's weight, as the only query."""
    weight = model.weight
    assert isinstance(weight, Tensor)
    return weight.square().sum()[None]


def test_a_loss_of_the_whole_batch_gets_the_weights(tmp_path: Path) -> None:
    """With `Task(total=...)`, the weights of the re-run go into the function of the batch."""
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(8, 3, generator=draw).double())

    def total(outputs: Tensor, batch: Any, weights: Tensor) -> Tensor:
        del batch
        return (weights[:, None] * outputs).square().sum() / weights.sum()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 2).double()

    def trained(weights: Tensor) -> Tensor:
        model = network()
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        for first in (0, 4, 0, 4):
            inputs = data.tensors[0][first : first + 4]
            outputs = torch.func.functional_call(model, parameters, (inputs,))
            value = total(outputs, None, weights[first : first + 4])
            grads = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
            moved = zip(parameters.items(), grads, strict=True)
            parameters = {name: tensor - 0.1 * grad for (name, tensor), grad in moved}
        return parameters["weight"].square().sum()

    model = network()
    task = backtrail.Task(model, data, total=total)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for _ in range(2):
            for (inputs,) in recorder.watch(DataLoader(data, 4)):
                total(model(inputs), None, torch.ones(4).double()).backward()
                optimizer.step()
                optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    query = backtrail.Custom(size, labels=["size"])
    found = method().attribute(run, query).total()[0, 0]
    mean = np.zeros(8)
    for drawn in draws_of(run, method()).weights:
        weights = torch.tensor(drawn, requires_grad=True)
        (slope,) = torch.autograd.grad(trained(weights), weights)
        mean -= np.log(1 / FLOOR) * drawn * slope.numpy() / 2
    np.testing.assert_allclose(found, mean, rtol=1e-9)


def test_a_sample_is_never_reported_as_zero_because_it_was_not_drawn(tmp_path: Path) -> None:
    """Every sample's total is the mean over the re-runs that drew it, of which there is one."""
    case = CASES_BY_NAME["momentum"]
    run = recorded_case(case, tmp_path)
    made = method(runs=4, share=0.25)
    found = made.attribute(run, standard_queries())
    draws = draws_of(run, made)
    assert (draws.counts == 1).all()
    assert (np.abs(found.total()) > 0).all()
    assert np.isnan(found.standard_error()).all()


def test_standard_errors_equal_their_slow_formula(tmp_path: Path) -> None:
    """A standard error is the spread of a sample's estimates, over the root of their number."""
    case = CASES_BY_NAME["momentum"]
    run = recorded_case(case, tmp_path)
    made = method(runs=5, share=0.5)
    out = tmp_path / "out"
    found = made.attribute(run, standard_queries(), observed_at=[3, 5], out=out)
    draws = draws_of(run, made)
    estimates: dict[int, list[np.ndarray]] = {row: [] for row in range(ROWS)}
    for number, weights in enumerate(draws.weights):
        recorded = recorded_with_weights(case, weights, tmp_path / str(number))
        total = backtrail.DIT().attribute(recorded, standard_queries(), observed_at=[3, 5]).total()
        for drawn_row in np.flatnonzero(draws.drawn[number]).tolist():
            estimates[drawn_row].append(np.log(1 / FLOOR) * total[:, :, drawn_row])
    for row, own in estimates.items():
        slow = np.std(own, axis=0, ddof=1) / len(own) ** 0.5
        np.testing.assert_allclose(found.standard_error()[..., row], slow, rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(found.total()[..., row], np.mean(own, axis=0), rtol=1e-6)
    read = backtrail.open_influence(out)
    np.testing.assert_array_equal(read.standard_error(), found.standard_error())
    np.testing.assert_array_equal(read.standard_error(query=1), found.standard_error()[1:2])


def test_other_methods_have_no_standard_errors(tmp_path: Path) -> None:
    """A method that does not sample has NaN."""
    found = backtrail.DIT().attribute(recorded_run("sgd", tmp_path), standard_queries())
    assert found.standard_error().shape == found.total().shape
    assert np.isnan(found.standard_error()).all()


class Clock:
    """Counts calls of some functions, and interrupts at one of them."""

    def __init__(self, stop: int) -> None:
        self.left = stop

    def ticking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which is interrupted instead of called when its turn has come."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise Interrupted
            self.left -= 1
            return function(*args, **kwargs)

        return call


INTERRUPTED: list[tuple[type, str]] = [
    (Run, "transition"),
    (CotangentStore, "save"),
    (CotangentStore, "clear"),
    (InfluenceWriter, "write"),
    (InfluenceWriter, "write_standard_errors"),
    (InfluenceWriter, "mark_done"),
]


@pytest.mark.parametrize(
    "stops",
    [
        range(5, 60, 15),
        pytest.param(range(75), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_it_resumes_to_the_same_bits_wherever_it_is_killed(
    stops: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any step of any re-run, sweep or write, it resumes to the same bits."""
    monkeypatch.setattr("backtrail.methods.result.SHORTEST", 2)
    run = recorded_run("adamw", tmp_path)
    ask = partial(method(share=0.5, runs=3).attribute, run, standard_queries(), observed_at=[3, 5])
    whole = ask()
    interrupted = 0
    for stop in stops:
        out = tmp_path / str(stop)
        clock = Clock(stop)
        with monkeypatch.context() as patch:
            for owner, name in INTERRUPTED:
                patch.setattr(owner, name, clock.ticking(getattr(owner, name)))
            try:
                ask(out=out)
            except Interrupted:
                interrupted += 1
        resumed = ask(out=out)
        np.testing.assert_array_equal(resumed.values(), whole.values())
        np.testing.assert_array_equal(resumed.standard_error(), whole.standard_error())
        assert not (out / "reruns").exists()
    assert interrupted >= 4


def test_a_finished_result_is_read_and_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished attribution is opened from its folder, and other settings are refused."""
    run = recorded_run("adamw", tmp_path)
    out = tmp_path / "out"
    first = method().attribute(run, standard_queries(), out=out)
    with pytest.raises(DifferentInfluence, match="seed"):
        method(seed=1).attribute(run, standard_queries(), out=out)
    monkeypatch.setattr(
        "backtrail.methods.path_integrated.rerun.Rerun.train",
        lambda *_: pytest.fail("computed again"),
    )
    again = method().attribute(run, standard_queries(), out=out)
    np.testing.assert_array_equal(again.values(), first.values())


def test_a_task_that_does_not_reproduce_the_training_is_refused(tmp_path: Path) -> None:
    """Other labels than the recorded ones are noticed, though re-runs are compared with nothing."""
    recorded_run("momentum", tmp_path)
    case = CASES_BY_NAME["momentum"]
    other = backtrail.Task(
        case.built(), rows(), loss=lambda o, b: 2 * cross_entropy(o, b[1], reduction="none")
    )
    run = backtrail.open_run(tmp_path / "momentum", other)
    with pytest.raises(ReplayMismatch, match="the norm of its gradient"):
        method().attribute(run, standard_queries())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": backtrail.DIT(curvature="auto")}, "base.curvature='auto': expected a fixed"),
        (
            {"base": backtrail.DIT(denominator="renormalize")},
            "base.denominator='renormalize': expected 'keep'",
        ),
        ({"runs": 0}, "runs=0: expected a positive integer"),
        ({"floor": 0.0}, "floor=0.0: expected a number above 0 and below 1"),
        ({"floor": 1.0}, "floor=1.0: expected a number above 0 and below 1"),
        ({"share": 0.0}, "share=0.0: expected a number above 0 and at most 1"),
        ({"share": 1.5}, "share=1.5: expected a number above 0 and at most 1"),
        ({"seed": -1}, "seed=-1"),
        ({"share": 0.1}, "runs=2: expected at least 10 with share=0.1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """The error names the setting, and what it may be."""
    with pytest.raises(BadSetting, match=message):
        method(**settings)


def test_the_result_says_what_its_slices_are(tmp_path: Path) -> None:
    """Settings say that visits are shares, and that the result is not the derivative."""
    found = method().attribute(recorded_run("sgd", tmp_path), standard_queries())
    assert found.settings["exact"] is False
    assert "shares of the full removal" in str(found.settings["slices"])
    assert "runs=2, floor=0.01, share=1.0, seed=0" in repr(found)
    assert "shares" not in repr(found)


def test_trust_and_evaluate_compare_totals_alone(tmp_path: Path) -> None:
    """No check of the derivative is made, and the advice is about this method."""
    run = recorded_run("momentum", tmp_path)
    found = method().attribute(run, standard_queries())
    checked = backtrail.trust(run, found, removals=3)
    assert checked.derivative is None
    removed = list(checked.removal.samples)
    np.testing.assert_array_equal(checked.removal.predicted, found.total()[:, -1][:, removed])
    table = backtrail.evaluate(run, found, removals=4, groups=0)
    assert table["method"].unique().to_list() == ["PathIntegrated"]


def memorising(path: Path) -> tuple[Run, TensorDataset, int]:
    """Record digits with two noisy copies of each of six queries, wrongly labelled.

    Returns:
        The run, the queries with the wrong labels, and the number of clean rows before the copies.
    """
    clean = 200
    images, targets = load_digits(return_X_y=True)
    inputs = torch.tensor(images).float()
    inputs = (inputs - inputs.mean()) / inputs.std()
    labels = torch.tensor(targets)
    # Of different digits: copies of one query would otherwise help another one as well.
    asked = torch.stack([(labels == digit).nonzero()[-1, 0] for digit in range(6)])
    wrong = (labels[asked] + 3) % 10
    noise = 0.5 * torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    copies = inputs[asked].repeat_interleave(2, 0) + noise
    data = TensorDataset(
        torch.cat([inputs[:clean], copies]),
        torch.cat([labels[:clean], wrong.repeat_interleave(2)]),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    task = backtrail.classification(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    with backtrail.Recorder(path, task, optimizer) as recorder:
        for _ in range(40):
            order = torch.Generator().manual_seed(0)
            loader = DataLoader(data, 106, shuffle=True, generator=order)
            for batch_inputs, batch_labels in recorder.watch(loader):
                cross_entropy(model(batch_inputs), batch_labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(path, task), TensorDataset(inputs[asked], wrong), clean


def recall(found: backtrail.Influence, clean: int) -> float:
    """Return the share of the two largest scores of each query that are its own copies."""
    shares = []
    for query, scores in enumerate(found.total()[:, -1]):
        largest = np.argsort(-scores)[:2]
        shares.append(np.mean((largest - clean) // 2 == query))
    return float(np.mean(shares))


@pytest.mark.slow
def test_it_finds_the_rows_that_a_memorised_answer_comes_from(tmp_path: Path) -> None:
    """The planted copies have the largest influence, and by `DIT` they do not."""
    run, asked, clean = memorising(tmp_path / "run")
    queries = backtrail.Loss(asked)
    by_path = recall(backtrail.PathIntegrated().attribute(run, queries), clean)
    by_derivative = recall(backtrail.DIT().attribute(run, queries), clean)
    assert by_path >= 0.9
    assert by_derivative <= 0.5
