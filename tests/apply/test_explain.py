"""explain: what scorers propose is really removed, and the table holds what that did."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply.candidates import Scorer
from backtrail.errors import BadSetting, OtherRun
from backtrail.run.run import Run

CLEAN = 24
SCORERS: dict[str, Scorer] = {"TracIn": backtrail.TracIn(), "last state": backtrail.GradientDot()}


def memorising(path: Path) -> tuple[Run, TensorDataset]:
    """Record two clouds, with two copies of each of two queries under a wrong label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLEAN) % 2
    inputs = torch.randn(CLEAN, 6, generator=generator, dtype=torch.float64)
    inputs[:, 0] += 4.0 * labels - 2.0
    asked = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    asked[:, 0] += torch.tensor([-2.0, 2.0], dtype=torch.float64)
    wrong = torch.tensor([1, 0])
    noise = 0.05 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    copies = asked.repeat_interleave(2, 0) + noise
    data = TensorDataset(
        torch.cat([inputs, copies]), torch.cat([labels, wrong.repeat_interleave(2)])
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    task = backtrail.classification(model, data)
    with backtrail.Recorder(path, task, optimizer, checkpoints=backtrail.Every(10)) as recorder:
        for _ in range(12):
            for batch in recorder.watch(DataLoader(data, batch_size=7, shuffle=True)):
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(path, task), TensorDataset(asked, wrong)


def test_culprits_are_found_and_effects_are_those_of_removals(tmp_path: Path) -> None:
    """Both copies of each query come first, and all effects are those of trainings without."""
    run, asked = memorising(tmp_path / "run")
    queries = backtrail.Loss(asked)
    table = backtrail.explain(run, queries, 2, order="helpful", removals=16, scorers=SCORERS)
    assert table["query"].to_list() == ["loss[0]", "loss[0]", "loss[1]", "loss[1]"]
    assert table["rank"].to_list() == [1, 2, 1, 2]
    found = table["sample"].to_list()
    assert {*found[:2]} == {CLEAN, CLEAN + 1}
    assert {*found[2:]} == {CLEAN + 2, CLEAN + 3}
    alone = backtrail.leave_one_out(run, queries, samples=found)
    pairs = [[CLEAN, CLEAN + 1], [CLEAN + 2, CLEAN + 3]]
    together = backtrail.retrain(run, queries, pairs).change[:, 0]
    for place, row in enumerate(table.iter_rows(named=True)):
        query = place // 2
        assert row["effect"] == pytest.approx(alone[query, place], rel=1e-9)
        assert row["group_effect"] == pytest.approx(together[query, query], rel=1e-9)
        assert row["group"] == [sample for sample in pairs[query] if sample != row["sample"]]
        # For two samples the division is their Shapley value.
        mate = place + 1 if place % 2 == 0 else place - 1
        marginal = together[query, query] - alone[query, mate]
        shapley = (alone[query, place] + marginal) / 2
        assert row["share"] == pytest.approx(shapley, rel=1e-9)


def test_the_sentence_says_what_the_model_answers_without_them(tmp_path: Path) -> None:
    """It compares the predicted class with that of a training without the samples."""
    run, asked = memorising(tmp_path / "run")
    queries = backtrail.Loss(asked)
    table = backtrail.explain(run, queries, 2, order="helpful", removals=16, scorers=SCORERS)
    summary = table["summary"].unique(maintain_order=True).to_list()
    effect = backtrail.retrain(run, queries, [[CLEAN, CLEAN + 1]]).change[0, 0, 0]
    assert f"raises loss[0] by {effect:.3g}" in summary[0]
    scores = backtrail.Logit(asked, samples=[0], target=1)
    others = backtrail.Logit(asked, samples=[0], target=0)
    of_wrong = backtrail.retrain(run, scores, [[CLEAN, CLEAN + 1]])
    of_right = backtrail.retrain(run, others, [[CLEAN, CLEAN + 1]])
    before = of_wrong.base[0, 0] > of_right.base[0, 0]
    after = of_wrong.base[0, 0] + of_wrong.change[0, 0, 0] > (
        of_right.base[0, 0] + of_right.change[0, 0, 0]
    )
    assert before and not after
    assert "the model then predicts 0 instead of 1" in summary[0]


def test_a_bank_gives_the_same_table_again(tmp_path: Path) -> None:
    """The second call reads the re-runs; another run's bank is refused by its own error."""
    run, asked = memorising(tmp_path / "run")
    queries = backtrail.Loss(asked, aggregate="mean")
    first = backtrail.explain(run, queries, removals=8, scorers=SCORERS, bank=tmp_path / "bank")
    files = sorted(path.name for path in (tmp_path / "bank").glob("*.safetensors"))
    again = backtrail.explain(run, queries, removals=8, scorers=SCORERS, bank=tmp_path / "bank")
    assert first.equals(again)
    assert sorted(path.name for path in (tmp_path / "bank").glob("*.safetensors")) == files
    assert first.height <= 8
    assert first["effect"].abs().to_numpy().max() >= first["noise"].to_numpy().max()


@pytest.mark.parametrize("order", ["largest", "helpful", "harmful"])
def test_the_order(order: str, tmp_path: Path) -> None:
    """Shares fall in the order that was asked for, among what is proposed for the query."""
    run, asked = memorising(tmp_path / "run")
    queries = backtrail.Loss(asked, samples=[0])
    table = backtrail.explain(run, queries, 2, order=order, removals=10, scorers=SCORERS)  # type: ignore[arg-type]
    shares = table["share"].to_numpy()
    keys = {"largest": np.abs(shares), "helpful": shares, "harmful": -shares}[order]
    assert (np.diff(keys) <= 0).all()
    ranks = table.select(pl.col("TracIn rank", "last state rank"))
    assert ranks.to_numpy().min() >= 1


def test_a_scorer_that_cannot_answer_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others propose; without any, its own error is raised."""
    run, asked = memorising(tmp_path / "run")
    queries = backtrail.Loss(asked, samples=[0])
    (tmp_path / "other").mkdir()
    other_run, _ = memorising(tmp_path / "other" / "run")
    other = backtrail.TracIn().attribute(other_run, queries)
    scorers: dict[str, Scorer] = {"other": other, **SCORERS}
    table = backtrail.explain(run, queries, 1, removals=6, scorers=scorers)
    assert "other proposes no samples" in caplog.text
    assert "other rank" not in table.columns
    with pytest.raises(OtherRun):
        backtrail.explain(run, queries, 1, removals=6, scorers={"other": other})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "Invalid k=0"),
        ({"removals": 3}, "at least 8, 4 for each of 2 queries"),
        ({"scorers": {}}, "Invalid scorers="),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str, tmp_path: Path) -> None:
    """Each is named, with what it may be."""
    run, asked = memorising(tmp_path / "run")
    with pytest.raises(BadSetting, match=message):
        backtrail.explain(run, backtrail.Loss(asked), **options)  # type: ignore[arg-type]
