"""Queries: values and gradients against plain autograd, names, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.errors import BadQuery
from backtrail.queries import Query, Saliency, gradients, values
from tests.cases import CLASSES, FEATURES, mlp, normed, rows
from tests.recorded_runs import recorded_run

DATA = rows(seed=3, count=7)
INPUTS, LABELS = DATA.tensors


def margins(model: nn.Module) -> Tensor:
    """Log-odds of the label, by probabilities."""
    p = model(INPUTS).softmax(1)[torch.arange(7), LABELS]
    return (p / (1 - p)).log()


def saliency(model: nn.Module) -> Tensor:
    """Derivative of the label's logit of row 2 by the features 0 and 1."""
    x = INPUTS[2:3].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[0, LABELS[2]], x, create_graph=True)
    return slope[0, :2]


PLAIN = {
    "loss": (
        backtrail.Loss(DATA, [1, 4]),
        lambda m: cross_entropy(m(INPUTS), LABELS, reduction="none")[[1, 4]],
    ),
    "mean loss": (
        backtrail.Loss(DATA, aggregate="mean", batch=3),
        lambda m: cross_entropy(m(INPUTS), LABELS)[None],
    ),
    "sum of losses": (
        backtrail.Loss(DATA, [0, 5], aggregate="sum"),
        lambda m: cross_entropy(m(INPUTS[[0, 5]]), LABELS[[0, 5]], reduction="sum")[None],
    ),
    "logit": (backtrail.Logit(DATA, [2, 3]), lambda m: m(INPUTS)[[2, 3], LABELS[[2, 3]]]),
    "logit of a class": (backtrail.Logit(DATA, [2], target=1), lambda m: m(INPUTS)[[2], [1]]),
    "margin": (backtrail.Margin(DATA), margins),
    "feature": (backtrail.Feature(DATA, [6], layer="0", unit=4), lambda m: m[0](INPUTS)[[6], [4]]),
    "saliency": (Saliency(DATA, [2], inputs=[0, 1]), saliency),
    "parameter": (
        backtrail.Parameter("0.weight", [(1, 2), (4, 0)]),
        lambda m: m[0].weight[[1, 4], [2, 0]],
    ),
    "custom": (
        backtrail.Custom(lambda m: m[2].bias.square().sum()),
        lambda m: m[2].bias.square().sum()[None],
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_are_those_of_plain_autograd(name: str) -> None:
    """Every kind of query, on a smooth network."""
    query, plain = PLAIN[name]
    torch.manual_seed(0)
    model = mlp().double()
    task = backtrail.classification(model, DATA)
    trained = [n for n, _ in model.named_parameters()]
    found, by_params, _ = gradients(
        query, task, params=task.parameters(), buffers={}, trained=trained
    )
    truth = plain(model)
    torch.testing.assert_close(found, truth.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        values(query, task, params=task.parameters(), buffers={}), found, rtol=1e-12, atol=1e-14
    )
    assert len(query.names) == len(set(query.names)) == len(truth)
    for row, number in enumerate(truth):
        slopes = torch.autograd.grad(
            number, list(model.parameters()), retain_graph=True, allow_unused=True
        )
        for key, slope in zip(trained, slopes, strict=True):
            expected = torch.zeros_like(by_params[key][row]) if slope is None else slope
            torch.testing.assert_close(by_params[key][row], expected, rtol=1e-10, atol=1e-12)


def test_queries_read_running_statistics_and_their_derivative() -> None:
    """An eval-mode loss depends on BatchNorm's buffers; central differences agree."""
    torch.manual_seed(0)
    model = normed().double()
    task, query = backtrail.classification(model, DATA), backtrail.Loss(DATA, aggregate="mean")
    params = task.parameters()
    buffers = {n: b + 0.3 if b.is_floating_point() else b for n, b in task.buffers().items()}
    _, _, by_buffers = gradients(query, task, params=params, buffers=buffers, trained=list(params))
    for name in ("1.running_mean", "1.running_var"):
        step = torch.zeros(5, dtype=torch.float64)
        step[2] = 1e-6
        up, down = (
            values(query, task, params=params, buffers=buffers | {name: buffers[name] + s * step})
            for s in (1, -1)
        )
        torch.testing.assert_close(by_buffers[name][:, 2], (up - down) / 2e-6, rtol=1e-7, atol=1e-9)


def test_train_mode_queries_use_batch_statistics() -> None:
    """mode="train" reads other numbers than the default."""
    torch.manual_seed(0)
    model = normed().double()
    task = backtrail.classification(model, DATA)
    params, buffers = task.parameters(), task.buffers()
    model.train()
    truth = cross_entropy(model(INPUTS), LABELS).detach()
    found = values(
        backtrail.Loss(DATA, aggregate="mean", mode="train"), task, params=params, buffers=buffers
    )
    torch.testing.assert_close(found[0], truth, rtol=1e-12, atol=0)
    assert not torch.allclose(
        found, values(backtrail.Loss(DATA, aggregate="mean"), task, params=params, buffers=buffers)
    )


def test_asking_leaves_the_live_model_alone() -> None:
    """Mode, weights and gradients of the user's model are untouched."""
    model = normed().double()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = backtrail.classification(model, DATA)
    gradients(
        backtrail.Margin(DATA),
        task,
        params=task.parameters(),
        buffers=task.buffers(),
        trained=list(task.parameters()),
    )
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("query", "what"),
    [
        (backtrail.Parameter("9.weight", [(0,)]), r"parameter '9.weight'.*0.weight"),
        (backtrail.Feature(DATA, [0], layer="encoder", unit=0), "layer 'encoder'"),
        (
            backtrail.Custom(lambda m: m[0].weight, labels=["a", "b"]),
            f"2 labels.*{5 * FEATURES} numbers",
        ),
    ],
)
def test_queries_for_what_is_not_there_say_what_is(query: Query, what: str) -> None:
    """Names are checked against the model."""
    task = backtrail.classification(mlp().double(), DATA)
    with pytest.raises(BadQuery, match=what):
        values(query, task, params=task.parameters(), buffers={})


def test_rows_that_are_not_there_are_refused_at_once() -> None:
    """When the query is made, not when it is asked."""
    with pytest.raises(BadQuery, match=r"samples=\[7\].*7 rows"):
        backtrail.Loss(DATA, samples=[1, 7])


def test_one_sweep_answers_all_kinds_like_sweeps_of_their_own(tmp_path: Path) -> None:
    """Influence on a logit of every class adds up to influence on their sum."""
    run = recorded_run("adamw", tmp_path)
    parts = sum(
        backtrail.DIT().attribute(run, backtrail.Logit(DATA, [0], target=c)).total()
        for c in range(CLASSES)
    )
    inputs = INPUTS[:1]
    whole = (
        backtrail.DIT()
        .attribute(run, backtrail.Custom(lambda m: m(inputs).sum(), labels=["all"]))
        .total()
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-14)
