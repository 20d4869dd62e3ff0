"""DIT is exact: every slot of every step, through the recorder, the folder and the sweep, against brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from tests.cases import CASES, Case, record, rows
from tests.oracles.nudge import nudge_every_weight

TEST = rows(seed=1, count=4)


def read(model: nn.Module) -> Tensor:
    """The loss of two rows, and the mean of all."""
    losses = cross_entropy(model(TEST.tensors[0]), TEST.tensors[1], reduction="none")
    return torch.stack([losses[0], losses[2], losses.mean()])


def asked() -> backtrail.Custom:
    """The same as a query."""
    return backtrail.Custom(read, labels=["row 0", "row 2", "mean"])


def assert_exact(found: np.ndarray, truth: np.ndarray) -> None:
    """Within 1e-6 of the largest derivative, for every query and observed state."""
    scale = np.abs(truth).max(axis=(2, 3))
    assert (scale > 0).all()
    error = np.abs(found - truth).max(axis=(2, 3)) / scale
    assert error.max() <= 1e-6, error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reverse_sweep_equals_nudging_each_weight(case: Case, tmp_path: Path) -> None:
    """The adjoint agrees with training again after a tiny change of one slot's weight, from step 0 on."""
    model, data = case.built(), rows()
    record(case, model, data, tmp_path / "run")
    run = backtrail.open_run(tmp_path / "run", case.task(model, data))
    run.verify()
    states = sorted({len(case.groups) - 1, len(case.groups)})
    influence = backtrail.DIT(chunk=2).attribute(run, asked(), observed_at=states)
    assert_exact(influence.values(), nudge_every_weight(case, read, states))
