"""Rankings of wrong labels against their definitions, the table, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply import signals as scores
from backtrail.apply.cleaning import gradient_sizes
from backtrail.apply.cross_validation import cross
from backtrail.errors import BadSetting, NoClasses, OtherRun, RowsNotReadable, UnusedOption
from backtrail.run.run import Run
from tests.cases import CASES_BY_NAME, rows
from tests.recorded_runs import recorded_regression, recorded_run
from tests.streams import SAMPLE_IDS, STREAM_ROWS, recorded_stream

WRONG = [3, 17, 40, 77, 90]
METHODS = [
    "mean-loss",
    "held-out",
    "margin",
    "el2n",
    "loss",
    "tracin",
    "self-influence",
    "dit",
    "dve",
]


def suspicion(run: Run, **options: Any) -> np.ndarray:
    """Return the scores in the order of the samples."""
    return backtrail.find_mislabeled(run, **options).sort("sample")["score"].to_numpy()


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Record a training on three clusters, with five labels of another cluster."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.arange(120) % 3
    centres = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -3.0]])
    inputs = centres[truth] + 0.5 * torch.randn(120, 2, generator=draw)
    labels = truth.clone()
    labels[WRONG] = (truth[WRONG] + 1) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, 3))
    data = TensorDataset(inputs, labels)
    task = backtrail.classification(model, data)
    folder = tmp_path_factory.mktemp("blobs") / "run"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Epochs()) as recorder:
        for _ in range(6):
            for batch in recorder.watch(DataLoader(data, 10, shuffle=True)):
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder, task)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_labels_among_clouds_come_first(blobs: Run, method: Any) -> None:
    """Every ranking finds wrong labels of separate clusters, and suggests the right ones."""
    table = backtrail.find_mislabeled(blobs, method=method)
    assert table.columns == ["rank", "sample", "score", "label", "suggested"]
    assert table["rank"].to_list() == list(range(1, 121))
    assert table["score"].is_sorted(descending=True)
    assert sorted(table["sample"].to_list()) == list(range(120))
    assert len(set(table["sample"][:5]) & set(WRONG)) >= 4
    found = table.filter(pl.col("sample").is_in(WRONG))
    assert (found["suggested"] == found["sample"] % 3).all()
    assert (table["label"] != table["suggested"]).all()
    assert table.sort("sample")["label"].to_list() == blobs.task.data.tensors[1].tolist()


def test_rankings_are_what_they_say(tmp_path: Path) -> None:
    """Every score is the mean of its quantity over the given states."""
    run = recorded_run("adamw", tmp_path)
    states = [2, 3, 5]
    expected = {
        "mean-loss": np.mean([scores.losses(run, state) for state in states], axis=0),
        "margin": -scores.margins(run, states),
        "el2n": scores.el2n(run, states),
        "loss": scores.losses(run, run.steps),
        "tracin": gradient_sizes(run, states),
        "self-influence": np.abs(backtrail.DiffIn(states).self_influence(run)),
    }
    for method, wanted in expected.items():
        np.testing.assert_allclose(
            suspicion(run, method=method, checkpoints=states), wanted, rtol=1e-9
        )
    crossed = cross(run, states)
    found = suspicion(run, method="held-out", checkpoints=states)
    np.testing.assert_allclose(found, (crossed.out + crossed.inside) / 2, rtol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "two groups", "one cycle", "frozen", "tied, adamw"])
def test_tracin_squares_the_gradient_of_every_row(name: str, tmp_path: Path) -> None:
    """The score is the squared gradient times the rate, row by row with autograd."""
    run = recorded_run(name, tmp_path)
    data = rows()
    states = [1, 4]
    expected = np.zeros(run.samples)
    for state in states:
        model = CASES_BY_NAME[name].built()
        model.load_state_dict(run.state(state, replay=True).params, strict=False)
        named = {
            key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad
        }
        groups = zip(run.manifest.groups, run.step(state).settings, strict=True)
        rates = {key: float(settings["lr"]) for group, settings in groups for key in group}  # type: ignore[arg-type]
        for row in range(run.samples):
            inputs, label = data[row]
            slopes: tuple[Tensor, ...] = torch.autograd.grad(
                cross_entropy(model(inputs[None]), label[None]), list(named.values())
            )
            sizes = zip(named, slopes, strict=True)
            expected[row] += sum(rates[key] * float(slope.square().sum()) for key, slope in sizes)
    np.testing.assert_allclose(gradient_sizes(run, states), expected, rtol=1e-9)


def test_a_sample_never_seen_did_no_harm(tmp_path: Path) -> None:
    """A sample that is in no batch has a score of 0.0, not -0.0."""
    run = recorded_run("twice in a batch", tmp_path)
    table = backtrail.find_mislabeled(
        run, method=backtrail.DIT().attribute(run, backtrail.Loss(rows()))
    )
    assert str(table.filter(pl.col("sample") == 8)["score"].item()) == "0.0"


@pytest.mark.parametrize(
    ("method", "made"), [("dit", backtrail.DIT()), ("dve", backtrail.DataValueEmbedding())]
)
def test_harm_is_negative_influence(
    method: Any, made: backtrail.DIT | backtrail.DataValueEmbedding, tmp_path: Path
) -> None:
    """The score is minus the influence on the training or other loss, at the end or in a window."""
    run = recorded_run("momentum", tmp_path)
    other = rows(seed=1, count=6)
    own = made.attribute(run, backtrail.Loss(run.task.data, aggregate="mean"))
    np.testing.assert_allclose(suspicion(run, method=method), -own.total()[0, 0], rtol=1e-9)
    on_others = made.attribute(run, backtrail.Loss(other, aggregate="mean"), observed_at=[2, 5])
    found = suspicion(run, method=method, validation=other, window=(2, 5))
    np.testing.assert_allclose(found, -on_others.window(2, 5)[0], rtol=1e-9)
    np.testing.assert_allclose(suspicion(run, method=on_others, window=(2, 5)), found, rtol=1e-9)
    np.testing.assert_allclose(
        suspicion(run, method=on_others), -on_others.total()[0, -1], rtol=1e-9
    )
    each = made.attribute(run, backtrail.Loss(other))
    np.testing.assert_allclose(suspicion(run, method=each), -each.total()[:, 0].mean(0), rtol=1e-9)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_list_is_written(blobs: Run, suffix: str, tmp_path: Path) -> None:
    """The file is the returned table, and replaces an older one."""
    path = tmp_path / f"review{suffix}"
    path.write_text("old")
    table = backtrail.find_mislabeled(blobs, method="loss", out=path)
    read = pl.read_csv(path) if suffix == ".csv" else pl.read_parquet(path)
    assert read.equals(table)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["held-out", "mean-loss", "margin", "tracin"])
def test_samples_with_ids_show_them(method: Any, tmp_path: Path) -> None:
    """The table has every id once, with its label."""
    run = recorded_stream(tmp_path / "run")
    table = backtrail.find_mislabeled(run, method=method)
    assert sorted(table["sample"].to_list()) == sorted(SAMPLE_IDS)
    labels = dict(zip(SAMPLE_IDS, rows_of_ids(), strict=True))
    assert table["label"].to_list() == [labels[sample] for sample in table["sample"].to_list()]


def rows_of_ids() -> list[int]:
    """Return the labels in the order of the ids."""
    return STREAM_ROWS.tensors[1].tolist()


def test_rows_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    """Without readable training rows, methods that need them are refused."""
    run = recorded_stream(tmp_path / "run")
    with pytest.raises(BadSetting, match="validation=None"):
        backtrail.find_mislabeled(run, method="dit")
    with pytest.raises(RowsNotReadable):
        backtrail.find_mislabeled(run, method="self-influence")


@pytest.mark.parametrize(
    "method", ["held-out", "mean-loss", "loss", "tracin", "self-influence", "dit", "dve"]
)
def test_numbers_have_no_label_to_suggest(method: Any, tmp_path: Path) -> None:
    """A regression is ranked without labels, by "loss" in the order of the losses."""
    run = recorded_regression(tmp_path / "run")
    table = backtrail.find_mislabeled(run, method=method)
    assert table["label"].is_null().all()
    assert table["suggested"].is_null().all()
    assert table.schema["suggested"] == pl.Int64
    losses = scores.losses(run, run.steps)
    assert method != "loss" or table["sample"][0] == losses.argmax()


@pytest.mark.parametrize("method", ["margin", "el2n"])
def test_classes_that_are_not_there_are_told(method: Any, tmp_path: Path) -> None:
    """Methods that compare classes refuse a regression."""
    with pytest.raises(NoClasses, match="Functions that read only losses work"):
        backtrail.find_mislabeled(recorded_regression(tmp_path / "run"), method=method)


def test_impossible_settings_are_refused_before_any_work(blobs: Run, tmp_path: Path) -> None:
    """Invalid and unused settings are refused, with what is expected."""
    refused: dict[str, dict[str, Any]] = {
        "with a < b": {"window": (3, 3), "method": "dit"},
        "out='review.txt'": {"out": "review.txt"},
        "checkpoints=0": {"checkpoints": 0},
        "one or more states": {"checkpoints": []},
        "state 0 is untrained": {"checkpoints": [0, 2]},
    }
    for told, options in refused.items():
        with pytest.raises(BadSetting, match=told):
            backtrail.find_mislabeled(blobs, **options)
    unused: dict[str, dict[str, Any]] = {
        r"validation=.*method='loss'\) does not use it; it takes checkpoints, out\.": {
            "method": "loss",
            "validation": rows(),
        },
        r"window=\(0, 3\): .*method='mean-loss'\) does not use it": {"window": (0, 3)},
    }
    for sentence, options in unused.items():
        with pytest.raises(UnusedOption, match=sentence):
            backtrail.find_mislabeled(blobs, **options)
    other = recorded_run("sgd", tmp_path)
    with pytest.raises(OtherRun):
        backtrail.find_mislabeled(
            blobs, method=backtrail.DIT().attribute(other, backtrail.Loss(rows()))
        )


def test_a_run_that_is_none_is_refused() -> None:
    """A run that is none is refused in a process without shape checks."""
    code = (
        "import backtrail\n"
        "try: backtrail.find_mislabeled(None)\n"
        "except backtrail.BacktrailError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Invalid run=None: expected a run")
