"""Curvature from sampled labels of some of a step's samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import backtrail
from backtrail.errors import BadSetting, NotCut
from backtrail.methods.dve.gather import Walk
from backtrail.methods.dve.sampled_labels import Drawn
from backtrail.task.task import select_rows
from tests.cases import ADAMW, CASES, SGD, Case, one_group
from tests.methods.dve.unprojected import relative_error, unprojected
from tests.recorded_runs import recorded_case

NEARLY = 0.999  # of a step's samples: by way of a pass of their own, and all of them


def arrays(run: backtrail.Run, made: backtrail.DataValueEmbedding, step: int) -> dict[str, Tensor]:
    """Return the features of a step."""
    return Walk(run, made._features(run.task, run.manifest)).step(step)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pass_of_their_own_finds_what_that_of_all_does(case: Case, tmp_path: Path) -> None:
    """A pass of the chosen samples alone gives what the pass of all samples gives."""
    run = recorded_case(case, tmp_path)
    made = {"rank": 6, "damping": 0.5}
    found = backtrail.DataValueEmbedding(**made, drawn=NEARLY).embed(run).values()  # type: ignore[arg-type]
    truth = backtrail.DataValueEmbedding(**made).embed(run).values()  # type: ignore[arg-type]
    assert relative_error(found, truth) <= 1e-9


@pytest.mark.parametrize("rule", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_rows_are_gradients_of_single_losses(rule: Any, tmp_path: Path) -> None:
    """Every row is the gradient of one chosen sample's loss, weighted to represent the batch."""
    run = recorded_case(
        Case("one", one_group(rule, lr=0.01), batches=[[0, 1, 2, 3, 4], [5, 6, 7]]), tmp_path
    )
    made = unprojected(drawn=0.4, seed=3)
    found = arrays(run, made, 0)
    task = run.task
    step = run.transition(0)
    params = run.state(0).params
    chosen = Drawn(task, 0.4, 3).chosen(step)
    slots = chosen.slots[0]
    assert len(slots) == len(found["fisher"]) == 2
    assert found["fisher_share"].tolist() == pytest.approx([1 / 2, 1 / 2])
    part = select_rows(step.batches[0], slots)
    for place in range(len(slots)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        losses = Drawn(task, 0.4, 3).loss(0, 0)(task.outputs(leaves, {}, part)[0], part)
        slopes = torch.autograd.grad(losses[place], list(leaves.values()))
        wanted = torch.cat([slope.flatten() for slope in slopes])
        torch.testing.assert_close(found["fisher"][place], wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_on_average_it_is_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """With half of the samples the mean over 80 seeds is still Gauss-Newton's result."""
    run = recorded_case(Case("sgd", one_group(SGD, lr=0.3)), tmp_path)
    query = backtrail.Loss(run.task.data, samples=[0, 3])
    truth = backtrail.DIT(curvature=backtrail.GaussNewton()).attribute(run, query).values()
    draws = np.stack(
        [unprojected(drawn=0.5, seed=seed).attribute(run, query).values() for seed in range(80)]
    )
    left = draws.std(0) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - truth) <= 4.5 * left + 1e-12).all()
    assert relative_error(draws.mean(0), truth) < 0.1


def test_chosen_are_spread_over_the_micro_batches(tmp_path: Path) -> None:
    """The share is that of the whole step, over all of its batches, and depends on the seed."""
    case = Case(
        "two", one_group(SGD, lr=0.1), accumulate=2, batches=[[0, 1, 2], [3, 4], [5, 6, 7], [8, 0]]
    )
    run = recorded_case(case, tmp_path)
    draws = Drawn(run.task, 0.2, 0)
    for step in range(run.steps):
        chosen = draws.chosen(run.transition(step))
        assert sum(map(len, chosen.slots.values())) == 1
        assert chosen.times == 5
    assert unprojected(drawn=0.2).embed(run).values().any()
    others = [Drawn(run.task, 0.2, seed).chosen(run.transition(0)) for seed in range(9)]
    assert len({tuple(chosen.slots[0].tolist()) for chosen in others}) > 1


def test_a_seed_chooses_these_samples_and_labels(tmp_path: Path) -> None:
    """The same on every version of torch, and again by another process."""
    batches = [[0, 1, 2], [3, 4], [5, 6, 7], [8, 0]]
    case = Case("two", one_group(SGD, lr=0.1), accumulate=2, batches=batches)
    run = recorded_case(case, tmp_path)
    chosen = [Drawn(run.task, 0.6, 6).chosen(run.transition(step)).slots for step in range(2)]
    assert [slots[0].tolist() for slots in chosen] == [[1, 2], [1, 2]]
    assert [slots[1].tolist() for slots in chosen] == [[1], [0]]
    task = backtrail.classification(torch.nn.Linear(1, 1), [])
    logits = torch.tensor([[0.3, -0.2, 0.9]] * 8)
    losses = Drawn(task, 0.6, 5).loss(1, 0)(logits, (None, torch.zeros(8, dtype=torch.long)))
    labels = torch.tensor([2, 0, 0, 2, 0, 1, 2, 0])
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(losses, wanted)


def test_what_cannot_be_done() -> None:
    """Shares outside of (0, 1], and batches that cannot be split into samples, are refused."""
    for share in (0.0, 1.5):
        with pytest.raises(BadSetting, match=f"Invalid drawn={share}: expected 0 < drawn <= 1"):
            backtrail.DataValueEmbedding(drawn=share)
    with pytest.raises(BadSetting, match=r'Invalid drawn=0.5: expected drawn=1 with fisher="emp'):
        backtrail.DataValueEmbedding(fisher="empirical", drawn=0.5)
    with pytest.raises(
        NotCut, match=r"of shape \[2, 4\] in this batch does not have the 4 samples .* Use drawn=1"
    ):
        select_rows({"x": torch.zeros(4, 3), "edges": torch.zeros(2, 4)}, torch.tensor([1]))
    kept = select_rows(
        {"x": torch.arange(4), "scale": torch.tensor(2.0), "name": "a"}, torch.tensor([1, 3])
    )
    assert kept["x"].tolist() == [1, 3]
    assert (float(kept["scale"]), kept["name"]) == (2.0, "a")
