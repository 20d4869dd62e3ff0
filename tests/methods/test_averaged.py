"""Queries of averaged weights against torch's own averages of plain trainings."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import backtrail
from backtrail.errors import BadSetting, DifferentInfluence, TooLittleMemory
from backtrail.methods.memory import Limits, budget
from backtrail.methods.retrain.retrain import retrain
from backtrail.queries import Query
from backtrail.run.run import Run
from backtrail.step.step import Transition
from backtrail.sweep.adjoint import pull_back
from tests.cases import ADAMW, SGD, Case, normed, one_group, rows, train
from tests.interruption import Interrupted
from tests.oracles import nudge
from tests.oracles.nudge import assert_exact
from tests.recorded_runs import recorded_case
from tests.standard_queries import standard_losses, standard_queries

CASES = [
    Case("momentum", one_group(SGD, lr=0.3, momentum=0.9)),
    Case("adamw", one_group(ADAMW, lr=0.01)),
    Case("batchnorm, momentum", one_group(SGD, lr=0.2, momentum=0.9), model=normed),
    Case("batchnorm, adamw", one_group(ADAMW, lr=0.003), model=normed),
]
EMA: dict[str, Any] = {"decay": 0.7}
AVERAGES: dict[str, dict[str, Any]] = {
    "timm": EMA | {"use_buffers": True},
    "torch": EMA | {"start": 1},
    "every second": EMA | {"every": 2},
    "swa": {"decay": None, "start": 3, "use_buffers": True},
}
STATES = [2, 4, 5]


def averaged(name: str) -> backtrail.Averaged:
    """Return the standard queries of an average of the weights."""
    return backtrail.Averaged(standard_queries(), **AVERAGES[name])


def observed(name: str) -> Callable[..., np.ndarray]:
    """Return what trains in plain PyTorch with an AveragedModel, and evaluates queries of it."""
    query = averaged(name)

    def observe(
        case: Case,
        read: Callable[[nn.Module], Tensor],
        states: Sequence[int],
        weights: object = None,
    ) -> object:
        model = case.built()
        model.train()
        update = None if query.decay is None else get_ema_multi_avg_fn(query.decay)
        average = AveragedModel(model, multi_avg_fn=update, use_buffers=query.use_buffers)
        found = {}
        if query.start == 0:
            average.update_parameters(model)
        for number in train(case, model, rows(), weights):  # type: ignore[arg-type]
            if number >= query.start and (number - query.start) % query.every == 0:
                average.update_parameters(model)
            if number in states:
                found[number] = read_in_eval_mode(
                    average if number >= query.start else model, model, read, query
                )
        return np.stack([found[number] for number in states], axis=1)

    return observe  # type: ignore[return-value]


def read_in_eval_mode(
    average: nn.Module,
    model: nn.Module,
    read: Callable[[nn.Module], Tensor],
    query: backtrail.Averaged,
) -> np.ndarray:
    """Evaluate queries of a copy in eval mode; buffers not averaged are the model's own."""
    copy = deepcopy(average.module if isinstance(average, AveragedModel) else average)
    if not query.use_buffers:
        for ours, live in zip(copy.buffers(), model.buffers(), strict=True):
            ours.copy_(live)
    copy.eval()
    with torch.no_grad():
        return read(copy).numpy()


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sweep_of_an_average_equals_nudging_each_weight(
    case: Case, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The influence on an average equals brute force, before and after the average's start."""
    monkeypatch.setattr(nudge, "observe", observed(name))
    truth = nudge.nudge_every_weight(case, standard_losses, STATES)
    influence = backtrail.DIT(chunk=2).attribute(
        recorded_case(case, tmp_path), averaged(name), observed_at=STATES
    )
    assert_exact(influence.values(), truth)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_leaving_out_reads_the_same_average(case: Case, name: str, tmp_path: Path) -> None:
    """Re-runs of any start and stack size evaluate the same average."""
    run = recorded_case(case, tmp_path)
    observe = observed(name)
    samples = [0, 4, 8]
    base = observe(case, standard_losses, STATES)
    found = retrain(
        run, averaged(name), [[sample] for sample in samples], observed_at=STATES, batch=1
    )
    np.testing.assert_allclose(found.base[:, -1], base[:, -1], rtol=1e-12)
    for place, sample in enumerate(samples):

        def weights(step: int, sample: int = sample) -> Tensor:
            return torch.tensor(
                [float(row != sample) for row in case.batches[step]], dtype=torch.float64
            )

        truth = observe(case, standard_losses, STATES, weights) - base
        np.testing.assert_allclose(found.change[:, :, place], truth, rtol=1e-9, atol=1e-13)


def test_shares_add_up_to_one_and_to_the_running_average() -> None:
    """The states' shares equal those of the running average, and add up to one."""
    for name in AVERAGES:
        query = averaged(name)
        folded = np.zeros(9)
        for number in range(9):
            rate = query.share(number, number)
            folded = folded + rate * (np.eye(9)[number] - folded)
            if number < query.start:
                folded = np.eye(9)[number]
            np.testing.assert_allclose(
                [query.share(t, number) for t in range(9)], folded, atol=1e-15
            )
            assert sum(folded) == pytest.approx(1.0)


def test_no_decay_is_the_state_itself(tmp_path: Path) -> None:
    """An average with decay 0 is the last state, bit for bit."""
    run = recorded_case(CASES[3], tmp_path)
    plain = backtrail.DIT().attribute(run, standard_queries(), observed_at=STATES).values()
    found = (
        backtrail.DIT()
        .attribute(run, backtrail.Averaged(standard_queries(), decay=0.0), observed_at=STATES)
        .values()
    )
    np.testing.assert_array_equal(found, plain)


def test_an_interrupted_attribution_of_an_average_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted anywhere and resumed, it has the same bits; another average is refused."""
    monkeypatch.setattr("backtrail.methods.result.SHORTEST", 1)
    run = recorded_case(CASES[3], tmp_path)
    query = averaged("timm")
    whole = (
        backtrail.DIT().attribute(run, query, observed_at=STATES, out=tmp_path / "whole").values()
    )
    for stop in range(run.steps):

        def failing(transition: Transition, *args: Any, stop: int = stop, **options: Any) -> object:
            if transition.step.index == stop:
                raise Interrupted
            return pull_back(transition, *args, **options)

        monkeypatch.setattr("backtrail.sweep.adjoint.pull_back", failing)
        with pytest.raises(Interrupted):
            backtrail.DIT().attribute(run, query, observed_at=STATES, out=tmp_path / f"part{stop}")
        monkeypatch.setattr("backtrail.sweep.adjoint.pull_back", pull_back)
        resumed = backtrail.DIT().attribute(
            run, query, observed_at=STATES, out=tmp_path / f"part{stop}"
        )
        np.testing.assert_array_equal(resumed.values(), whole)
    with pytest.raises(DifferentInfluence, match="average"):
        backtrail.DIT().attribute(
            run, averaged("every second"), observed_at=STATES, out=tmp_path / "whole"
        )


def test_trust_asks_the_average(tmp_path: Path) -> None:
    """Trust's derivative check passes for an average."""
    run = recorded_case(CASES[1], tmp_path)
    influence = backtrail.DIT().attribute(run, averaged("torch"))
    statement = backtrail.trust(run, influence, removals=9)
    assert statement.derivative is not None
    assert statement.derivative.passed
    assert statement.derivative.error < 1e-6


def test_a_waiting_gradient_is_in_the_estimate(tmp_path: Path) -> None:
    """The memory estimate has one more gradient per query and observed state."""
    run = recorded_case(CASES[0], tmp_path)
    needed = [least(run, query) for query in (standard_queries(), averaged("timm"))]
    params = sum(tensor.nbytes for tensor in run.state(0).params.values())
    assert needed[1] - needed[0] == 3 * 4 * params  # 3 queries, 4 states


def least(run: Run, query: Query) -> int:
    """Return the least number of bytes that a sweep is accepted with, by bisection."""
    low = 1
    high = 2**30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            budget(run, query, 4, limits=Limits(memory=middle, chunk=1))
            high = middle
        except TooLittleMemory:
            low = middle
    return high


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda: backtrail.Averaged(standard_queries(), decay=1.0), "Invalid decay=1.0: expected"),
        (lambda: backtrail.Averaged(standard_queries(), start=-1), "Invalid start=-1: expected"),
        (lambda: backtrail.Averaged(standard_queries(), every=0), "Invalid every=0: expected"),
        (
            lambda: backtrail.Averaged(backtrail.Averaged(standard_queries())),
            "queries of the weights",
        ),
    ],
)
def test_what_is_no_average_is_refused(made: Callable[[], Query], what: str) -> None:
    """Invalid settings of an average are refused when it is made."""
    with pytest.raises(BadSetting, match=what):
        made()
