"""The demo: its data, its measures, and the whole of it once."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import backtrail
from backtrail import cli
from backtrail.cli import demo_task
from backtrail.cli.demo import unused_folder
from backtrail.cli.demo_measure import (
    accuracy,
    early_late,
    most_harmful,
    overhead,
    rankings,
    windows,
)
from backtrail.cli.demo_task import TRAINING, VALIDATION, WRONG, digits, fit, queries, task
from backtrail.influence.influence import Influence
from backtrail.run.run import Run


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Influence]:
    """Record the demo's training cut to three epochs; return the run and its influence."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_task, "EPOCHS", 3)
        learner = task()
        fit(learner, folder)
    run = backtrail.open_run(folder, learner)
    return run, backtrail.DIT().attribute(run, queries(), observed_at="epochs")


def test_a_tenth_of_the_labels_is_wrong() -> None:
    """Only the samples marked as wrong have another label, and only in the training set."""
    found = digits()
    given = found.training.tensors[1]
    assert torch.equal(given != found.truth, found.wrong)
    assert int(found.wrong.sum()) == WRONG
    assert [len(part) for part in (found.training, found.validation, found.test)] == [
        TRAINING,
        VALIDATION,
        397,
    ]
    assert 0 <= int(given.min()) <= int(given.max()) <= 9


def test_digits_are_the_same_every_time() -> None:
    """Split and wrong labels do not depend on the global seed."""
    first = digits()
    digits.cache_clear()
    torch.manual_seed(123)
    assert torch.equal(first.training.tensors[1], digits().training.tensors[1])


def test_recording_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The overhead is measured on trainings that end alike."""
    monkeypatch.setattr(demo_task, "EPOCHS", 1)
    found = overhead(20, repeats=1)
    assert found.identical
    assert min(found.plain, found.recorded) > 0


def test_accuracy_is_a_share() -> None:
    """An untrained network's accuracy is below 0.4."""
    assert 0 <= accuracy(task()) < 0.4


def test_rankings_count_wrong_labels(short: tuple[Run, Influence]) -> None:
    """The first ranking counts the wrong labels in `top`, and the last has all of them."""
    base, table = rankings(*short)
    names, found, losses = (column.to_list() for column in table)
    first = short[1].top(WRONG)["sample"].to_list()
    assert found[0] == int(digits().wrong[first].sum())
    assert found[-1] == WRONG
    assert names[0] == "influence, whole run"
    assert losses[-1] < base


def test_most_harmful_has_the_right_labels(short: tuple[Run, Influence]) -> None:
    """Labels are those of the data, and the worst epoch is the largest fall of the curve."""
    rank, sample, score, given, truth, verdict, epoch = most_harmful(short[1], 3).rows()[0]
    assert (rank, sample) == (1, short[1].top(1)["sample"][0])
    assert given == int(digits().training[sample][1])
    assert verdict == ("wrong label" if given != truth else "right label")
    curve = short[1].curve(sample=sample)["influence"].to_numpy()
    assert epoch == int(np.diff(curve).argmin()) + 1
    assert score == pytest.approx(curve[-1])


def test_windows_add_up_to_the_total(short: tuple[Run, Influence]) -> None:
    """The windows of the epochs add up to the total."""
    assert np.allclose(windows(short[1]).sum(axis=0), short[1].total()[0, -1])
    assert -1 <= early_late(short[1]) <= 1


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder that is not empty is left alone, and an empty one is used."""
    out = tmp_path / "demo"
    assert unused_folder(out) == out
    out.mkdir()
    assert unused_folder(out) == out
    (out / "mine").write_text("")
    (tmp_path / "demo-2").write_text("a file in the way")
    assert unused_folder(out) == tmp_path / "demo-3"


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most wrong labels are found, all checks pass, and the suggested commands run."""
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "FAILED" not in told
    assert "DIFFERENT" not in told
    for name in (
        "task.py",
        "run",
        "influence",
        "plots/curve.png",
        "plots/heatmap.png",
        "plots/removals.png",
    ):
        assert (folder / name).exists(), name
    wrong = digits().wrong[
        backtrail.open_influence(folder / "influence").top(WRONG)["sample"].to_list()
    ]
    assert int(wrong.sum()) > 0.75 * WRONG
    commands = [
        shlex.split(line.removeprefix("next:"))
        for line in told.splitlines()
        if " backtrail " in line
    ]
    commands = [words[1:] for words in commands if words[0] == "backtrail" and words[1] != "demo:"]
    assert [words[0] for words in commands] == [
        "info",
        "top",
        "curve",
        "patterns",
        "trust",
        "verify",
    ]
    for words in commands:
        assert cli.main(["4" if word == "100" else word for word in words]) == 0
