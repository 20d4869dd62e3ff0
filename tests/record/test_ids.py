"""Data without row numbers: batches carry the ids of their samples, and are stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import (
    BadIds,
    CannotRenormalize,
    UnknownId,
    UnreadableData,
    UnwatchableLoader,
    WrongData,
)
from backtrail.methods.dit.auto import candidate_rules, describe_rules
from tests.loops import adam, backward, mlp, refused, rows
from tests.oracles.agreement import agreement_with_removals
from tests.streams import SAMPLE_IDS, STREAM_ROWS, KeywordModel, Stream, recorded_stream, row_losses


def test_a_stream_is_recorded_by_id_and_attributed(tmp_path: Path) -> None:
    """Log and influence name samples by id, and removals agree with the derivative."""
    run = recorded_stream(tmp_path / "run")
    assert run.verify().difference < 1e-12
    assert all(
        sorted(sum((step.samples for step in run.log[t : t + 3]), ())) == sorted(SAMPLE_IDS)
        for t in (0, 3, 6)
    )
    assert run.samples == len(SAMPLE_IDS)
    assert run.ids.tolist() == sorted(SAMPLE_IDS)
    influence = backtrail.DIT().attribute(run, query(), observed_at="epochs", out=tmp_path / "dit")
    statement = backtrail.trust(run, influence, removals=12)
    assert statement.derivative is not None
    assert statement.derivative.error < 1e-6
    assert statement.removal.samples == tuple(sorted(SAMPLE_IDS))
    truth = backtrail.leave_one_out(run, query(), samples=SAMPLE_IDS)
    assert (
        np.corrcoef(truth[0], influence.total()[0, -1][np.searchsorted(influence.ids, SAMPLE_IDS)])[
            0, 1
        ]
        > 0.99
    )


def query() -> backtrail.Custom:
    """Return the mean loss of other rows as a query."""
    inputs, labels = rows(6, seed=1).tensors
    return backtrail.Custom(
        lambda model: cross_entropy(model(inputs.double()), labels), labels=["loss"]
    )


@pytest.mark.parametrize(
    "method",
    [backtrail.TracIn(), backtrail.GradientDot(), backtrail.DIT(curvature=backtrail.Zero())],
    ids=lambda m: type(m).__name__,
)
def test_every_method_counts_by_id(method: Any, tmp_path: Path) -> None:
    """The total of an id is the sum over the slots that hold it."""
    run = recorded_stream(tmp_path / "run")
    influence = method.attribute(run, query())
    values = influence.values()[0, -1]
    expected = dict.fromkeys(sorted(SAMPLE_IDS), 0.0)
    for step in run.log:
        for slot, sample in enumerate(step.samples):
            expected[sample] += float(values[step.index, slot])
    assert influence.ids.tolist() == sorted(SAMPLE_IDS)
    assert np.abs(values).max() > 0
    np.testing.assert_allclose(influence.total()[0, -1], list(expected.values()), rtol=1e-6)


def test_tables_show_ids(tmp_path: Path) -> None:
    """All tables, curves and plots give the same numbers for an id."""
    run = recorded_stream(tmp_path / "run")
    backtrail.DIT().attribute(run, query(), observed_at="epochs", out=tmp_path / "dit")
    influence = backtrail.open_influence(tmp_path / "dit")
    totals = dict(zip(influence.ids.tolist(), influence.total()[0, -1].tolist(), strict=True))
    assert sorted(influence.top(12)["sample"].to_list()) == sorted(SAMPLE_IDS)
    long = influence.to_polars().filter(observed_at=9)
    for sample in (2**62, 3):
        assert influence.top(12).filter(sample=sample)["influence"].item() == totals[sample]
        assert influence.curve(sample=sample)["influence"][-1] == pytest.approx(
            totals[sample], rel=1e-12
        )
        assert influence.visits_curve(sample=sample)["influence"].sum() == pytest.approx(
            totals[sample], rel=1e-12
        )
        assert long.filter(sample=sample)["influence"].sum() == pytest.approx(
            totals[sample], rel=1e-12
        )
    found = backtrail.patterns(influence)
    assert dict(found.select("sample", "total").iter_rows()) == pytest.approx(totals, rel=1e-12)
    assert influence.to_xarray()["id"].values.tolist() == sorted(SAMPLE_IDS)
    assert backtrail.plot.heatmap(influence, samples=[2**62]).get_yticklabels()[
        0
    ].get_text() == str(2**62)


def test_unknown_ids_are_refused(tmp_path: Path) -> None:
    """Run and influence refuse an unknown id, and name some of those they have."""
    run = recorded_stream(tmp_path / "run")
    influence = backtrail.DIT().attribute(run, query())
    asked: list[Callable[[], object]] = [
        lambda: influence.curve(sample=4),
        lambda: backtrail.leave_one_out(run, query(), samples=[4]),
    ]
    for ask in asked:
        with refused(UnknownId, "no sample 4", "12 samples, with ids 3, 5, 7"):
            ask()


def test_the_choice_of_a_sweep_finds_samples_by_their_ids(tmp_path: Path) -> None:
    """`curvature="auto"` measures the agreement with removals of the right ids."""
    run = recorded_stream(tmp_path / "run")
    chosen = str(backtrail.DIT(curvature="auto").attribute(run, query()).settings["chosen"])
    rules = candidate_rules(run, backtrail.Tangent())
    for rule, figure in zip(rules, agreement_with_removals(run, rules, query()), strict=True):
        assert f"{describe_rules(rule)} {figure:.2f}" in chosen


@pytest.mark.parametrize(
    "ids",
    [2, lambda batch: batch[2], lambda batch: batch[2].tolist()],
    ids=["place", "function", "list"],
)
def test_ids_in_tuples_and_by_function(ids: Any, tmp_path: Path) -> None:
    """Ids may be a column of a tuple or a function of the batch, in a list of batches too."""
    data = TensorDataset(*STREAM_ROWS.tensors, torch.tensor(SAMPLE_IDS))
    model = mlp()
    task = backtrail.classification(model, data, ids=ids)
    optimizer = adam(model)
    batches = list(DataLoader(data, batch_size=5))
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        watched = recorder.watch(batches)
        assert len(watched) == 3
        for batch in watched:
            backward(cross_entropy(model(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    assert [step.samples for step in run.log] == [
        tuple(SAMPLE_IDS[:5]),
        tuple(SAMPLE_IDS[5:10]),
        tuple(SAMPLE_IDS[10:]),
    ]
    assert run.verify().difference < 1e-5


WRONG: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "missing": (
        "key",
        lambda batch: batch,
        ("ids='key'", "no such entry", "['inputs', 'labels', 'id']"),
    ),
    "real": ("id", lambda batch: batch | {"id": batch["id"] / 2}, ("4 rows", "float32")),
    "negative": ("id", lambda batch: batch | {"id": -batch["id"]}, ("4 rows", "int64")),
    "too few": ("id", lambda batch: batch | {"id": batch["id"][:3]}, ("4 rows", "shape [3]")),
    "columns": (
        "id",
        lambda batch: batch | {"id": batch["id"][:, None]},
        ("4 rows", "shape [4, 1]"),
    ),
    "words": (
        "id",
        lambda batch: batch | {"id": ["a", "b", "c", "d"]},
        ("ids='id'", "a list of str"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_ids_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    """What is not one non-negative integer a row is refused, and the message describes it."""
    ids, change, words = WRONG[name]
    with refused(BadIds, *words):
        recorded_stream(tmp_path / "run", ids, change=change)


def test_a_stream_without_ids_is_told_of_them(tmp_path: Path) -> None:
    """A stream without ids is refused as data and as a loader; the message names `ids`."""
    model = mlp()
    with refused(UnreadableData, "Stream", "Task(ids=...)"):
        backtrail.Recorder(
            tmp_path / "run", backtrail.Task(model, Stream(), row_losses), adam(model)
        )
    with (
        refused(UnwatchableLoader, "no batch sampler", "Task(ids=...)"),
        backtrail.Recorder(
            tmp_path / "run", backtrail.classification(model, STREAM_ROWS), adam(model)
        ) as recorder,
    ):
        recorder.watch(DataLoader(Stream(), batch_size=4))


def test_a_run_with_ids_needs_a_task_with_ids(tmp_path: Path) -> None:
    """A run with ids needs a task with `ids`, and cannot renormalise denominators."""
    run = recorded_stream(tmp_path / "run", epochs=1)
    with refused(WrongData, "no ids="):
        backtrail.open_run(tmp_path / "run", backtrail.Task(KeywordModel(), None, row_losses))
    with refused(CannotRenormalize, "cannot be read again"):
        backtrail.DIT(denominator="renormalize").attribute(run, query())
