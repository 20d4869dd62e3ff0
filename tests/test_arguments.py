"""Arguments: numbers of Python, numpy and torch are taken alike, and all else is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import backtrail
from backtrail import arguments
from backtrail.errors import BadSetting, ImpossibleWindow, NeverTrainedOn
from bench import fuzz
from tests.processes import in_fresh_process
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

NAN = float("nan")
HUGE = 10**30


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7)])
def test_whole_numbers_of_all_libraries(value: Any) -> None:
    """A whole number becomes Python's own, whoever made it."""
    number = arguments.whole("k", value, least=1)
    assert number == 7
    assert type(number) is int


@pytest.mark.parametrize(
    "value",
    [
        *(7.0, 7.5, NAN, True, np.array([True])[0], torch.tensor([True])[0], "7", None, [7]),
        *(np.array([7]), torch.tensor([7]), torch.tensor(7.0), 1j, object(), int, 0, -1, -HUGE),
    ],
)
def test_what_is_no_positive_whole_number(value: Any) -> None:
    """A float, a bool, a word or a container is no number of things, nor is 0."""
    with pytest.raises(BadSetting, match=r"Invalid k=.*: expected a positive integer\."):
        arguments.whole("k", value, least=1)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.array(2.0), torch.tensor(2.0)])
def test_real_numbers_of_all_libraries(value: Any) -> None:
    """A real number becomes Python's own, whoever made it."""
    assert arguments.positive("width", value) == 2.0
    assert type(arguments.positive("width", value)) is float


@pytest.mark.parametrize(
    "value", [0, -1, NAN, float("inf"), True, "2", b"2", None, [2.0], 2j, np.complex64(2), HUGE**20]
)
def test_what_is_no_positive_number(value: Any) -> None:
    """NaN, infinity, words and bools are no numbers."""
    with pytest.raises(BadSetting, match="Invalid width="):
        arguments.positive("width", value)


@pytest.mark.parametrize(
    "value",
    [
        [3, 1],
        (3, 1),
        np.array([3, 1]),
        torch.tensor([3, 1]),
        pl.Series([3, 1]),
        {3: 0, 1: 0}.keys(),
    ],
)
def test_several_whole_numbers(value: Any) -> None:
    """Any container of whole numbers keeps its order."""
    assert arguments.whole_numbers("samples", value) == [3, 1]


@pytest.mark.parametrize(
    "value",
    [
        *([], "", "31", b"31", {3: 1}, 3, None, [1.9], [1.0], [True, False], np.array([True])),
        *([[3]], [None], [NAN], np.array(3), torch.tensor(3), [-1], np.array([[3]]), list),
    ],
)
def test_what_is_no_list_of_numbers(value: Any) -> None:
    """A word is no list of letters, a mask no list of numbers, and floats are not rounded."""
    with pytest.raises(BadSetting, match="Invalid samples="):
        arguments.whole_numbers("samples", value)


def test_ranges_of_steps() -> None:
    """A range lies within the training, and does not run backwards."""
    assert arguments.step_range("steps", (np.int64(2), torch.tensor(9)), 9) == (2, 9)
    for wrong in ((5, 2), (-1, 3), (0, 10), (100, 200)):
        with pytest.raises(ImpossibleWindow, match="expected 0 <= start <= stop <= 9"):
            arguments.step_range("steps", wrong, 9)
    for other in (5, "ab", (1.5, 2), (1, 2, 3), (True, 2), None):
        with pytest.raises(BadSetting, match="Invalid steps="):
            arguments.step_range("steps", other, 9)


@pytest.mark.parametrize("value", ["", None, 3, b"folder", "\0", "y" * 5000, Path])
def test_what_is_no_path(value: Any) -> None:
    """An empty string is not the current folder."""
    with pytest.raises(BadSetting, match="Invalid out="):
        arguments.path("out", value)


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    """A folder cannot be made below a file, and a file needs a folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetting, match="file is a file"):
        arguments.folder("out", tmp_path / "file" / "below")
    with pytest.raises(BadSetting, match="a file in a folder that exists"):
        arguments.file("out", tmp_path / "missing" / "table.csv")


def test_precisions() -> None:
    """A floating-point dtype of torch, and nothing that is called like one."""
    assert arguments.precision("dtype", torch.float64) is torch.float64
    for wrong in (torch.int64, torch.complex64, "float64", np.float64, float, 64):
        with pytest.raises(BadSetting, match="Invalid dtype="):
            arguments.precision("dtype", wrong)


def test_numbers_of_numpy_and_torch_give_the_same(tmp_path: Path) -> None:
    """An attribution and re-runs take them wherever they take Python's."""
    # The shape checks of the tests also check the annotated types, which are Python's.
    for ours, theirs in in_fresh_process(_by_both_kinds_of_numbers, tmp_path):
        np.testing.assert_array_equal(ours, theirs)


def _by_both_kinds_of_numbers(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    run = recorded_run("twice in a batch", folder)
    queries = standard_queries()
    seen = run.seen[:2]
    states: Any = torch.tensor([2, 3])
    chunk: Any = np.int64(2)
    samples: Any = torch.from_numpy(seen)
    batch: Any = torch.tensor(1)
    plain = backtrail.DIT(chunk=2).attribute(run, queries, observed_at=[2, 3])
    other = backtrail.DIT(chunk=chunk).attribute(run, queries, observed_at=states)
    return [
        (plain.values(), other.values()),
        (
            backtrail.leave_one_out(run, queries, samples=seen.tolist(), batch=1),
            backtrail.leave_one_out(run, queries, samples=samples, batch=batch),
        ),
    ]


@pytest.mark.parametrize("value", [0, [], "", [0, 2], True])
def test_states_that_cannot_be_observed(value: Any, tmp_path: Path) -> None:
    """No step comes before state 0, and nothing is replaced by the end without a word."""
    run = recorded_run("twice in a batch", tmp_path)
    with pytest.raises(BadSetting, match="Invalid observed_at="):
        backtrail.TracIn().attribute(run, standard_queries(), observed_at=value)


def test_samples_that_were_never_trained_on(tmp_path: Path) -> None:
    """Asked about by number, they are refused: zero would look like an answer."""
    run = recorded_run("twice in a batch", tmp_path)
    queries = standard_queries()
    unseen = int(np.setdiff1d(run.ids, run.seen)[0])
    influence = backtrail.TracIn().attribute(run, queries)
    look_ups: list[Callable[[], object]] = [
        lambda: backtrail.leave_one_out(run, queries, samples=[unseen]),
        lambda: backtrail.retrain(run, queries, [[int(run.seen[0]), unseen]]),
        lambda: backtrail.forget(run, [unseen]),
        lambda: backtrail.DiffIn().self_influence(run, [unseen]),
        lambda: backtrail.DataValueEmbedding(rank=2).embed(run).nearest(unseen),
        lambda: influence.curve(sample=unseen),
    ]
    for look_up in look_ups:
        with pytest.raises(NeverTrainedOn, match=f"Sample {unseen} was never trained on"):
            look_up()


def test_wrong_arguments_of_every_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 calls with a wrong argument: no hang, no nonsense, no error of another library."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    outcomes = in_fresh_process(fuzz.fuzz, 150, 3)
    assert [outcome for outcome in outcomes if outcome.kind in fuzz.BAD] == []
    counts = Counter(outcome.kind for outcome in outcomes)
    assert counts["BacktrailError"] > 100
