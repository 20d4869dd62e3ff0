"""A lasting change of the gradient moves parameters as the optimizers' formulas say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import backtrail
from backtrail.optim.steady_state import SteadyState, steady_state
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.tree import Tree
from tests.cases import CASES, Case, decay, one_group, record, rows

Kind = type[torch.optim.Optimizer]


def recorded(folder: Path, kind: Kind, **settings: object) -> Run:
    """A short run, with a clip or a penalty where those are among the settings."""
    case = Case(
        "one",
        one_group(kind, **{k: v for k, v in settings.items() if k not in {"clip", "penalty"}}),
    )
    extras = {k: v for k, v in settings.items() if k in {"clip", "penalty"}}
    case = Case("one", case.optimizer, **extras)  # type: ignore[arg-type]
    model, data = case.built(), rows()
    record(case, model, data, folder / "run")
    return backtrail.open_run(folder / "run", case.task(model, data))


def at(run: Run, step: int) -> tuple[SteadyState, State, Tree]:
    """A step's lasting answer, the state after it, and its gradient."""
    transition, state = run.transition(step), run.state(step, replay=True)
    grads, _, _ = transition.raw_gradient(state)
    return (
        steady_state(transition.task, transition.update, state, grads=grads),
        transition.advance(state),
        grads,
    )


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(
    ("kind", "settings", "rate", "kept"),
    [
        (torch.optim.SGD, {"lr": 0.3}, 0.3, 1.0),
        (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1}, 0.3, 0.97),
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}, 3.0, 1.0),
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True}, 3.0, 1.0),
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4}, 1.8, 1.0),
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.1}, 0.6, 0.94),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, -0.1, 1.0),
    ],
)
def test_sgd_has_one_rate(
    step: int, kind: Kind, settings: dict[str, float], rate: float, kept: float, tmp_path: Path
) -> None:
    """That of the group over one minus the momentum; weight decay takes its share."""
    found, _, _ = at(recorded(tmp_path, kind, **settings), step)
    for name in found.rate:
        torch.testing.assert_close(found.rate[name], torch.full_like(found.rate[name], rate))
        torch.testing.assert_close(found.decay[name], torch.full_like(found.decay[name], kept))


def test_asgd_starts_at_the_rate_of_its_group(tmp_path: Path) -> None:
    """Its own rate shrinks with every step; after the first it is not that of the first."""
    run = recorded(tmp_path, torch.optim.ASGD, lr=0.3, lambd=0.05, t0=1)
    for step, rate in ((0, 0.3), (1, 0.3 / (1 + 0.05 * 0.3) ** 0.75)):
        found, _, _ = at(run, step)
        for name, tensor in found.rate.items():
            torch.testing.assert_close(tensor, torch.full_like(tensor, rate))
            torch.testing.assert_close(
                found.decay[name], torch.full_like(tensor, 1 - 0.05 * rate), rtol=1e-6, atol=0
            )


def of_adam(moments: Tree) -> Tensor:
    """Adam's, after its step."""
    count = float(moments["step"])
    root = (moments["exp_avg_sq"] / (1 - 0.999**count)).sqrt()
    return 0.01 / ((1 - 0.9**count) * (root + 1e-8))


DIVIDED: list[tuple[Kind, dict[str, float], Callable[[Tree], Tensor]]] = [
    (torch.optim.Adam, {}, of_adam),
    (torch.optim.AdamW, {}, of_adam),
    (torch.optim.RMSprop, {}, lambda moments: 0.01 / (moments["square_avg"].sqrt() + 1e-8)),
    (
        torch.optim.RMSprop,
        {"momentum": 0.5},
        lambda moments: 0.02 / (moments["square_avg"].sqrt() + 1e-8),
    ),
    (torch.optim.Adagrad, {}, lambda moments: 0.01 / (moments["sum"].sqrt() + 1e-10)),
]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("kind", "settings", "formula"), DIVIDED)
def test_what_is_divided_by_a_root_is_taken_as_fixed(
    step: int,
    kind: Kind,
    settings: dict[str, float],
    formula: Callable[[Tree], Tensor],
    tmp_path: Path,
) -> None:
    """The rate over the root of the second moment, entry by entry, where a gradient ever came."""
    found, after, grads = at(recorded(tmp_path, kind, lr=0.01, **settings), step)
    for name, rate in found.rate.items():
        assert torch.isfinite(rate).all()
        alive = grads[name] != 0
        torch.testing.assert_close(
            rate[alive], formula(after.moments[name])[alive], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.model.__name__ == "mlp"], ids=str)
def test_every_optimizer_has_a_finite_answer(case: Case, tmp_path: Path) -> None:
    """From its first step on, also where a gradient never came; downhill unless maximizing."""
    model, data = case.built(), rows()
    record(case, model, data, tmp_path / "run")
    run = backtrail.open_run(tmp_path / "run", case.task(model, data))
    for step in (0, 2):
        found, _, grads = at(run, step)
        for name, rate in found.rate.items():
            assert torch.isfinite(rate).all()
            assert torch.isfinite(found.decay[name]).all()
            moving = rate[grads[name] != 0]
            assert ((moving <= 0) if case.name == "maximize" else (moving >= 0)).all()


def test_decoupled_and_coupled_decay_differ(tmp_path: Path) -> None:
    """AdamW shrinks by the rate times the decay; Adam lets the decay go through its division."""
    for kind in (torch.optim.AdamW, torch.optim.Adam):
        found, _, grads = at(recorded(tmp_path / kind.__name__, kind, lr=0.01, weight_decay=0.1), 3)
        for name, kept in found.decay.items():
            alive = grads[name] != 0
            truth = (
                torch.full_like(kept, 0.999)
                if kind is torch.optim.AdamW
                else 1 - 0.1 * found.rate[name]
            )
            torch.testing.assert_close(kept[alive], truth[alive], rtol=1e-6, atol=0)


def test_clipping_and_penalty_count(tmp_path: Path) -> None:
    """A clipped gradient moves less; an L2 penalty decays like coupled weight decay."""
    run = recorded(tmp_path, torch.optim.SGD, lr=0.3, clip=backtrail.ClipNorm(0.2))
    found, _, grads = at(run, 2)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    assert norm > 0.2
    for rate in found.rate.values():
        torch.testing.assert_close(
            rate, torch.full_like(rate, 0.3 * 0.2 / float(norm)), rtol=1e-4, atol=0
        )
    found, _, grads = at(
        recorded(tmp_path / "value", torch.optim.SGD, lr=0.3, clip=backtrail.ClipValue(0.1)), 2
    )
    for name, rate in found.rate.items():
        torch.testing.assert_close(rate, 0.3 * (grads[name].abs() <= 0.1).double())
    found, _, _ = at(recorded(tmp_path / "penalty", torch.optim.SGD, lr=0.3, penalty=decay), 2)
    for kept in found.decay.values():
        torch.testing.assert_close(kept, torch.full_like(kept, 1 - 0.3 * 0.1))
