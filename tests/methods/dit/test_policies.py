"""Sweeps with every curvature policy and both derivatives of the update."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import backtrail
from backtrail import stats
from backtrail.curvature.policies import Curvature
from backtrail.errors import BadSetting
from backtrail.run.run import Run
from bench.models import digits
from tests.cases import (
    ADAMW,
    CASES_BY_NAME,
    CLASSES,
    FEATURES,
    Case,
    normed,
    one_group,
    with_dropout,
)
from tests.recorded_runs import recorded_case
from tests.standard_queries import standard_queries

POLICIES = [
    backtrail.Hessian(),
    backtrail.GaussNewton(),
    backtrail.EmpiricalFisher(),
    backtrail.Zero(),
]
PARTED = [
    "batchnorm, adamw",
    "accumulation, batchnorm",
    "penalty",
    "batchnorm, skipped",
    "frozen",
    "tied, adamw",
]


def scores(run: Run, curvature: Curvature, chunk: int = 1) -> np.ndarray:
    """Return the influence of every slot at the ends of the epochs."""
    return (
        backtrail.DIT(curvature=curvature, chunk=chunk)
        .attribute(run, standard_queries(), observed_at="epochs")
        .values()
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("name", [*PARTED, "dropout"])
def test_differences_and_chunks_change_only_digits(
    name: str, policy: Curvature, tmp_path: Path
) -> None:
    """Autograd and differences agree for every policy, with one query a sweep and with two."""
    run = recorded_case(
        CASES_BY_NAME.get(name) or Case("dropout", one_group(ADAMW, lr=0.01), model=with_dropout),
        tmp_path,
    )
    exact = scores(run, policy)
    scale = np.abs(exact).max()
    assert scale > 0
    np.testing.assert_allclose(scores(run, policy, chunk=2), exact, rtol=0, atol=1e-11 * scale)
    by_difference: Curvature = replace(policy, product="difference")  # type: ignore[type-var]
    for chunk in (1, 2):
        np.testing.assert_allclose(
            scores(run, by_difference, chunk), exact, rtol=0, atol=1e-6 * scale
        )


def test_gauss_newton_is_the_hessian_where_outputs_are_linear(tmp_path: Path) -> None:
    """Of a linear model Gauss-Newton is the Hessian; the other two policies are not."""
    run = recorded_case(
        Case("linear", one_group(ADAMW, lr=0.05), model=lambda: nn.Linear(FEATURES, CLASSES)),
        tmp_path,
    )
    exact = scores(run, backtrail.Hessian())
    np.testing.assert_allclose(
        scores(run, backtrail.GaussNewton()), exact, rtol=0, atol=1e-12 * np.abs(exact).max()
    )
    for other in (backtrail.EmpiricalFisher(), backtrail.Zero()):
        assert np.abs(scores(run, other) - exact).max() > 1e-3 * np.abs(exact).max()


def test_the_last_step_feels_no_curvature(tmp_path: Path) -> None:
    """All policies agree on the last step's scores, and on no other step's."""
    run = recorded_case(Case("batchnorm", one_group(ADAMW, lr=0.01), model=normed), tmp_path)
    exact = scores(run, backtrail.Hessian())[:, 0]
    for other in POLICIES[1:]:
        found = scores(run, other)[:, 0]
        np.testing.assert_allclose(found[:, -1], exact[:, -1], rtol=1e-9, atol=1e-15)
        assert not np.allclose(found[:, 0], exact[:, 0], rtol=1e-6)


def test_a_policy_is_part_of_the_question(tmp_path: Path) -> None:
    """The result names its curvature, and its folder is refused for another one."""
    run = recorded_case(CASES_BY_NAME["adamw"], tmp_path)
    found = backtrail.DIT(curvature=backtrail.GaussNewton()).attribute(
        run, standard_queries(), out=tmp_path / "dit"
    )
    assert found.description.settings["curvature"] == "GaussNewton(product='autograd')"
    assert repr(found).startswith(
        "Influence by DIT with GaussNewton(product='autograd'), Tangent() ("
    )
    with pytest.raises(backtrail.BacktrailError, match="curvature"):
        backtrail.DIT(curvature=backtrail.Hessian()).attribute(
            run, standard_queries(), out=tmp_path / "dit"
        )


WRONG = {
    "DIT(curvature='hessian')": (
        "Invalid curvature='hessian': expected backtrail.Hessian(), GaussNewton(), "
    ),
    "DIT(curvature=backtrail.GaussNewton('finite'))": (
        "Invalid product='finite': expected 'autograd' or 'difference'"
    ),
    "DIT(slope='secant')": (
        "Invalid slope='secant': expected backtrail.Tangent() or backtrail.Secant()"
    ),
    "DIT(denominator='drop')": "Invalid denominator='drop': expected 'keep' or 'renormalize'",
    "DIT(chunk=0)": "Invalid chunk=0: expected a positive integer or None",
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


def test_a_secant_has_a_width() -> None:
    """A secant's width has to be positive."""
    with pytest.raises(BadSetting, match="a positive number of samples"):
        backtrail.Secant(-1.0)


def test_no_generator_is_moved(tmp_path: Path) -> None:
    """Differences draw dropout's masks again, and leave the random generator as it was."""
    run = recorded_case(Case("dropout", one_group(ADAMW, lr=0.01), model=with_dropout), tmp_path)
    before = torch.get_rng_state()
    scores(run, backtrail.GaussNewton(product="difference"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_secant_changes_nothing_for_sgd_and_something_for_adam(tmp_path: Path) -> None:
    """A secant is the tangent for SGD, which is linear in the gradient, but not for AdamW."""
    for name, same in (("nesterov with decay", True), ("adamw", False)):
        run = recorded_case(CASES_BY_NAME[name], tmp_path / name)
        exact = scores(run, backtrail.Hessian())
        found = (
            backtrail.DIT(slope=backtrail.Secant())
            .attribute(run, standard_queries(), observed_at="epochs")
            .values()
        )
        assert np.allclose(found, exact, rtol=0, atol=1e-9 * np.abs(exact).max()) == same


def test_a_secant_survives_adams_first_step(tmp_path: Path) -> None:
    """At Adam's first step the secant predicts removals, better than the tangent does."""
    data, _ = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))
    task = backtrail.classification(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=50, shuffle=True)):
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    query = backtrail.Loss(data, samples=range(200), aggregate="mean")
    samples = run.step(0).samples[:24]
    truth = backtrail.leave_one_out(run, query, samples=samples)
    found = [
        float(
            stats.pearson(
                backtrail.DIT(slope=slope).attribute(run, query).total()[:, 0, list(samples)], truth
            )[0]
        )
        for slope in (backtrail.Tangent(), backtrail.Secant())
    ]
    assert found[1] > max(0.95, found[0])


def test_trust_leaves_the_derivative_check_out_where_there_is_no_derivative(tmp_path: Path) -> None:
    """Trust does not check the derivative of an influence that is not meant to be exact."""
    run = recorded_case(CASES_BY_NAME["adamw"], tmp_path)
    for dit, checked in ((backtrail.DIT(), True), (backtrail.DIT(slope=backtrail.Secant()), False)):
        statement = backtrail.trust(run, dit.attribute(run, standard_queries()), removals=4)
        assert (statement.derivative is not None) == checked
    statement = backtrail.trust(
        run,
        backtrail.DIT(curvature=backtrail.Zero()).attribute(run, standard_queries()),
        removals=4,
    )
    assert statement.derivative is None
