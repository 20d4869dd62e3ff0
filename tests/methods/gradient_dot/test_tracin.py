"""TracIn and GradientDot against plain PyTorch, their cost, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import backtrail
from backtrail.methods.gradient_dot.products import slot_products
from backtrail.methods.gradient_dot.state_products import has_one_gradient
from backtrail.run.run import Run
from tests.cases import (
    ADAMW,
    CASES_BY_NAME,
    CLASSES,
    FEATURES,
    SGD,
    Case,
    one_group,
    rows,
    with_dropout,
)
from tests.oracles.gradient_products import GradientState, gradient_products
from tests.recorded_runs import recorded_case, recorded_run
from tests.standard_queries import standard_losses, standard_queries

KEPT = 2  # the cases keep every second state
METHODS: dict[str, tuple[backtrail.TracIn | backtrail.GradientDot, GradientState]] = {
    "every": (backtrail.TracIn(states="every", chunk=2), lambda step, _: step),
    "kept": (backtrail.TracIn(states="kept", chunk=2), lambda step, _: step - step % KEPT),
    "dot": (backtrail.GradientDot(chunk=2), lambda _, observed: observed),
}
CHOSEN = [
    "sgd",
    "momentum",
    "maximize",
    "adamw",
    "tied, sgd",
    "tied, adamw",
    "frozen",
    "unused",
    "two groups",
    "one cycle",
    "accumulation, adamw",
    "accumulation, batchnorm",
    "penalty",
    "clip norm",
    "twice in a batch",
    "short batches",
    "batchnorm, sgd",
    "batchnorm, adamw",
    "batchnorm, skipped",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHOSEN)
def test_scores_equal_a_loop_over_samples_and_queries(
    name: str, method: str, tmp_path: Path
) -> None:
    """The score of every slot is that of the oracle's loops, at two observed states."""
    case = CASES_BY_NAME[name]
    made, gradient_state = METHODS[method]
    run = recorded_run(name, tmp_path)
    states = [run.steps - 1, run.steps]
    truth = gradient_products(case, standard_losses, states, gradient_state)
    found = made.attribute(run, standard_queries(), observed_at=states).values()
    assert (np.abs(truth).max(axis=(2, 3)) > 0).all()
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-12 * np.abs(truth).max())


def test_the_last_step_of_plain_descent_is_the_derivative(tmp_path: Path) -> None:
    """At the last step of SGD, for a query that is linear, TracIn is exact."""
    run = recorded_run("sgd", tmp_path)
    query = backtrail.Parameter("0.weight", [(0, 1), (3, 2)])
    exact = backtrail.DIT().attribute(run, query).values()[..., -1, :]
    found = backtrail.TracIn().attribute(run, query).values()[..., -1, :]
    np.testing.assert_allclose(found, exact, rtol=1e-10)


def test_in_a_training_that_hardly_moves_all_methods_agree(tmp_path: Path) -> None:
    """With a tiny learning rate all gradient products approach the exact influence."""
    run = recorded_case(Case("slow", one_group(SGD, lr=1e-4)), tmp_path)
    exact = backtrail.DIT().attribute(run, standard_queries()).values()
    for made, _ in METHODS.values():
        found = made.attribute(run, standard_queries()).values()
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-3 * np.abs(exact).max())


def test_a_proponent_is_positive(tmp_path: Path) -> None:
    """The influence of every sample on its own loss is positive."""
    run = recorded_run("sgd", tmp_path)
    own = backtrail.Loss(run.task.data, samples=range(9))
    for made, _ in METHODS.values():
        total = made.attribute(run, own).total()[:, 0]
        assert (np.diag(total) > 0).all()


def test_a_model_that_drops_units_is_seen_with_the_masks_of_each_visit(tmp_path: Path) -> None:
    """Every visit is multiplied with its own dropout mask, not once for its sample."""
    run = recorded_case(Case("dropout", one_group(ADAMW, lr=0.01), model=with_dropout), tmp_path)
    assert not has_one_gradient(run)
    query = gradients_at(run, run.steps)
    found = backtrail.GradientDot().attribute(run, standard_queries()).values()
    state = run.state(run.steps)
    for index, step in enumerate(run.log):
        for slot in range(len(step.samples)):
            weights = torch.zeros(len(step.samples), dtype=torch.float64)
            weights[slot] = 1.0
            (_, (slope, _, _)) = next(run.transition(index).micro_batch_gradients(state, weights))
            truth = sum(0.01 * (query[name] * slope[name]).flatten(1).sum(1) for name in slope)
            np.testing.assert_allclose(
                found[:, 0, index, slot], np.asarray(truth), rtol=1e-9, atol=1e-15
            )


def gradients_at(run: Run, number: int) -> dict[str, Tensor]:
    """Return the queries' gradients at a state, by parameter."""
    from backtrail.queries import gradients  # noqa: PLC0415

    state = run.state(number)
    return gradients(
        standard_queries(),
        run.task,
        params=state.params,
        buffers=state.buffers,
        trained=run.trained,
    )[1]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the slots of every call that takes products."""
    seen: list[int] = []

    def counting(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found = slot_products(*arguments, **options)
        seen.append(found[0].shape[1])
        return found

    with monkeypatch.context() as patch:
        patch.setattr("backtrail.methods.gradient_dot.state_products.slot_products", counting)
        yield seen


@pytest.mark.parametrize("epochs", [2, 6])
def test_kept_states_cost_a_product_per_sample_and_not_per_visit(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two stored states every sample is multiplied once, and nothing is replayed."""
    run = long_run(epochs, tmp_path)
    monkeypatch.setattr(
        "backtrail.step.step.Transition.advance", lambda *_: pytest.fail("replayed")
    )
    for made in (backtrail.TracIn(states="kept"), backtrail.GradientDot()):
        with counted(monkeypatch) as seen:
            made.attribute(run, standard_queries())
        assert sum(seen) == 9  # state 0 is the only one kept before the end


def test_groups_with_one_rate_share_a_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameter groups share a product exactly if their learning rates are equal."""

    def groups(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        def made(model: nn.Module) -> torch.optim.Optimizer:
            weights, bias = model.parameters()
            params: list[dict[str, Any]] = [
                {"params": [weights]},
                {"params": [bias], "lr": lr, "momentum": 0.5},
            ]
            return SGD(params, lr=0.1)

        return made

    for lr, products in ((0.1, 9), (0.2, 18)):
        case = Case("groups", groups(lr), model=lambda: nn.Linear(FEATURES, CLASSES))
        run = recorded_case(case, tmp_path / str(lr))
        with counted(monkeypatch) as seen:
            backtrail.GradientDot().attribute(run, standard_queries())
        assert sum(seen) == products


def long_run(epochs: int, folder: Path) -> Run:
    """Record epochs of batches of three; only the first and the last state are stored."""
    model = nn.Linear(FEATURES, CLASSES).double()
    data = rows()
    task = backtrail.classification(model, data)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with backtrail.Recorder(
        folder / "run", task, optimizer, checkpoints=backtrail.Only([0])
    ) as recorder:
        for _ in range(epochs):
            for inputs, labels in recorder.watch(DataLoader(data, 3, shuffle=True)):
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder / "run", task)


def test_stored_batches_are_taken_as_they_were_fed(tmp_path: Path) -> None:
    """A run with stored batches has no gradient of a sample apart from its visits."""
    case = CASES_BY_NAME["sgd"]
    data = rows()
    model = case.built()
    task = case.task(model, data)
    optimizer = case.optimizer(model)
    with backtrail.Recorder(tmp_path / "run", task, optimizer, keep_batches=True) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, 3)):
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not has_one_gradient(backtrail.open_run(tmp_path / "run", task))


@pytest.mark.parametrize(
    ("name", "leans"),
    [
        ("sgd", "no"),
        ("short batches", "no"),
        ("batchnorm, sgd", "yes"),
        ("accumulation, batchnorm", "yes"),
    ],
)
def test_samples_that_lean_on_their_batch_are_noticed(
    name: str, leans: str, tmp_path: Path
) -> None:
    """Only BatchNorm makes a sample's gradient depend on its batch."""
    assert has_one_gradient(recorded_run(name, tmp_path)) == (leans == "no")


def test_a_head_that_starts_at_zero_hides_no_batchnorm(tmp_path: Path) -> None:
    """BatchNorm is found where the head starts at zero, so that state 0 shows no difference."""

    def zeroed() -> nn.Module:
        head = nn.Linear(5, CLASSES)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return nn.Sequential(nn.Linear(FEATURES, 5, bias=False), nn.BatchNorm1d(5), head)

    assert not has_one_gradient(
        recorded_case(Case("zeroed", one_group(SGD, lr=0.3), model=zeroed), tmp_path)
    )


def test_losses_are_those_of_the_visits_where_they_are_known(tmp_path: Path) -> None:
    """TracIn gives the losses of the visits; GradientDot, which does not replay, gives NaN."""
    run = recorded_run("adamw", tmp_path)
    exact = backtrail.DIT().attribute(run, standard_queries()).loss
    np.testing.assert_allclose(
        backtrail.TracIn().attribute(run, standard_queries()).loss, exact, rtol=1e-12
    )
    assert np.isnan(backtrail.GradientDot().attribute(run, standard_queries()).loss).all()


WRONG = {
    "TracIn(states='all')": "Invalid states='all': expected 'every' or 'kept'",
    "TracIn(chunk=0)": "Invalid chunk=0: expected a positive integer or None",
    "TracIn(memory=-1)": "Invalid memory=-1: expected a positive integer or None",
    "GradientDot(chunk=-2)": "Invalid chunk=-2: expected a positive integer or None",
}


def test_settings_that_are_none_are_refused() -> None:
    """Invalid settings are refused when the method is made, in a process without shape checks."""
    code = (
        "import backtrail\n"
        "for made in {!r}:\n"
        " try: eval('backtrail.' + made)\n"
        " except backtrail.BacktrailError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(list(WRONG))], capture_output=True, text=True, check=True
    )
    for said, wanted in zip(done.stdout.splitlines(), WRONG.values(), strict=True):
        assert said.startswith(wanted)


def test_memory_that_cannot_hold_a_gradient_is_refused(tmp_path: Path) -> None:
    """Too small a memory is refused, with the setting to raise."""
    with pytest.raises(backtrail.BacktrailError, match="allow more with memory=bytes"):
        backtrail.TracIn(memory=1).attribute(recorded_run("sgd", tmp_path), standard_queries())


def test_averaged_weights_are_left_to_dit(tmp_path: Path) -> None:
    """Queries of averaged weights are refused, with the method that has them."""
    with pytest.raises(backtrail.BacktrailError, match=r"backtrail\.DIT supports averages"):
        backtrail.TracIn().attribute(
            recorded_run("sgd", tmp_path), backtrail.Averaged(standard_queries(), decay=0.5)
        )


def test_a_result_says_how_it_was_made(tmp_path: Path) -> None:
    """The result names method and states, and its folder is refused for other states."""
    run = recorded_run("sgd", tmp_path)
    found = backtrail.TracIn(states="kept").attribute(
        run, standard_queries(), out=tmp_path / "tracin"
    )
    assert repr(found).startswith("Influence by TracIn with states='kept' (custom): 3 queries")
    assert repr(backtrail.GradientDot().attribute(run, standard_queries())).startswith(
        "Influence by GradientDot (custom)"
    )
    assert found.settings["exact"] is False
    with pytest.raises(backtrail.BacktrailError, match="states"):
        backtrail.TracIn().attribute(run, standard_queries(), out=tmp_path / "tracin")


def test_the_cases_keep_every_second_state(tmp_path: Path) -> None:
    """The cases store every second state, as the oracle's `KEPT` assumes."""
    assert recorded_run("sgd", tmp_path).kept == (0, 2, 4, 5)


MANY_WAYS = [
    "adamw",
    "tied, adamw",
    "batchnorm, adamw",
    "penalty",
    "accumulation, batchnorm",
    "twice in a batch",
]


@pytest.mark.parametrize("name", MANY_WAYS)
def test_many_queries_get_what_few_get(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two ways to take products, with and without per-sample gradients, agree."""
    run = recorded_run(name, tmp_path)
    queries = backtrail.Loss(rows(), samples=range(len(rows())))
    for method in (backtrail.TracIn(), backtrail.GradientDot()):
        monkeypatch.setattr("backtrail.methods.gradient_dot.products.MANY", 1000)
        few = method.attribute(run, queries)
        monkeypatch.setattr("backtrail.methods.gradient_dot.products.MANY", 2)
        many = method.attribute(run, queries)
        np.testing.assert_allclose(many.values(), few.values(), rtol=1e-9, atol=1e-14)


def test_many_queries_of_a_loss_that_couples_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that couples samples gets the same scores for many queries as for few."""
    model = nn.Linear(FEATURES, CLASSES).double()
    data = rows()
    task = backtrail.Task(
        model, data, lambda outputs, _: (outputs - outputs.mean(0)).square().sum(1)
    )
    optimizer = SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, _ in recorder.watch(DataLoader(data, 3)):
            outputs = model(inputs)
            (outputs - outputs.mean(0)).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    few = backtrail.TracIn().attribute(run, standard_queries()).values()
    monkeypatch.setattr("backtrail.methods.gradient_dot.products.MANY", 1)
    np.testing.assert_array_equal(
        backtrail.TracIn().attribute(run, standard_queries()).values(), few
    )
