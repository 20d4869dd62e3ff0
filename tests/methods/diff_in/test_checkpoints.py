"""Diff-In from checkpoints of a training that was not recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import backtrail
from tests.cases import CLASSES, FEATURES, rows
from tests.recorded_runs import recorded_sgd
from tests.standard_queries import standard_queries


def test_checkpoints_give_what_the_run_gives(form: Any, tmp_path: Path) -> None:
    """A list of checkpoints, a folder of .pt and one of safetensors give the results of the run."""
    run = recorded_sgd(tmp_path)
    states = (4, 10, 16)
    tensors = {state: run.state(state).params for state in states}
    (tmp_path / "pt").mkdir()
    (tmp_path / "safe").mkdir()
    for state, content in tensors.items():
        torch.save(
            {"model": {f"module.{name}": t for name, t in content.items()}},
            tmp_path / "pt" / f"step{state}.pt",
        )
        save_file(content, tmp_path / "safe" / f"2-of-4_{state}.safetensors")
    made = backtrail.DiffIn(states, form)
    truth = made.attribute(run, standard_queries()).total()[:, -1]
    join_items = [(state, content, 0.02) for state, content in tensors.items()]
    for source, lr in (
        (join_items, None),
        (tmp_path / "pt", 0.02),
        (tmp_path / "safe", dict.fromkeys(states, 0.02)),
    ):
        left = backtrail.Checkpoints(run.task, source, steps=16, lr=lr)
        found = made.attribute(left, standard_queries())
        assert found.values().shape == (3, 1, 1, 24)
        np.testing.assert_allclose(found.total()[:, 0], truth, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(
            made.self_influence(left, [3]), made.self_influence(run, [3]), rtol=1e-9
        )
        change = made.parameter_change(left, [1, 2])
        other = made.parameter_change(run, [1, 2])
        np.testing.assert_allclose(change["0.bias"], other["0.bias"], rtol=1e-9)
    assert backtrail.DiffIn(2).attribute(left, standard_queries()).settings["states"] == [10, 16]


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    """The message names the file or tensor that is wrong, and what is expected."""
    model = nn.Linear(FEATURES, CLASSES).double()
    data = rows()
    task = backtrail.classification(model, data)
    good = model.state_dict()

    def refused(source: Any, said: str, steps: int = 10, lr: Any = None) -> None:
        with pytest.raises(backtrail.BacktrailError, match=said):
            backtrail.DiffIn(2).self_influence(backtrail.Checkpoints(task, source, steps, lr), [0])

    refused([], "No usable checkpoints: the list is empty")
    refused([(0, good, 0.1)], "step 0, before any update")
    refused(
        [(11, good, 0.1)],
        "step 11 is not a checkpoint of this training: the training has the states 0 to 10",
    )
    refused([(5, {"weight": good["weight"]}, 0.1)], "step 5.*it has no parameter 'bias'")
    refused(
        [(5, {**good, "bias": torch.zeros(7)}, 0.1)], r"'bias' has shape \[7\], the model's \[3\]"
    )
    refused(tmp_path, "holds no file that ends with")
    (tmp_path / "last.pt").write_bytes(b"nothing")
    refused(tmp_path, "has no step number in its name", lr=0.1)
    (tmp_path / "last.pt").rename(tmp_path / "step5.pt")
    refused(tmp_path, "no learning rate is given for step 5")
    refused(tmp_path, "step5.pt cannot be used", lr=0.1)
    with pytest.raises(backtrail.BacktrailError, match="there are checkpoints of the steps"):
        backtrail.DiffIn([4]).self_influence(backtrail.Checkpoints(task, [(5, good, 0.1)], 10))
