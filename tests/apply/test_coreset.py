"""The selection of a subset: size, balance between classes, order and scores."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.apply.coreset import herded, last_inputs, quotas
from backtrail.errors import (
    BadSetting,
    EmbeddedElsewhere,
    NoClasses,
    OtherRun,
    RowsNotReadable,
    UnknownSample,
)
from backtrail.run.run import Run
from tests.recorded_runs import recorded_run
from tests.standard_queries import standard_queries

METHODS = "dve", "dit", "diff-in", "tracin", "herding", "el2n", "loss", "random"
ROWS = 40
CLASSES = 4


def made(folder: Path, *, ids: bool = False) -> Run:
    """Record a classifier of two layers on four classes of 16, 12, 8 and 4 rows."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 16 + [1] * 12 + [2] * 8 + [3] * 4)
    numbers = torch.arange(100, 100 + ROWS)
    data = TensorDataset(torch.randn(ROWS, 5, generator=draw) + labels[:, None], labels, numbers)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    task = backtrail.classification(model, data, ids=2 if ids else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Epochs()) as recorder:
        for _ in range(4):
            for inputs, targets, _ in recorder.watch(DataLoader(data, 8, shuffle=True)):
                cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder, task)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Record the training once for all tests."""
    return made(tmp_path_factory.mktemp("coreset") / "run")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_a_share_of_every_class(run: Run, method: str) -> None:
    """Half of every class is kept, each sample once, and a second call gives the same."""
    table = backtrail.select_coreset(run, 0.5, method=method)
    assert table.columns == ["sample", "score", "rank", "label"]
    assert table["sample"].n_unique() == len(table) == ROWS / 2
    assert table["rank"].to_list() == list(range(1, len(table) + 1))
    assert table.group_by("label").len().sort("label")["len"].to_list() == [8, 6, 4, 2]
    labels = run.task.data.tensors[1].numpy()
    assert table["label"].to_list() == labels[table["sample"].to_numpy()].tolist()
    assert backtrail.select_coreset(run, 0.5, method=method).equals(table)
    assert table["score"].is_null().all() == (method in {"dve", "herding", "random"})


@pytest.mark.parametrize("method", METHODS)
def test_the_first_of_many_are_balanced_too(run: Run, method: str) -> None:
    """Of the first k samples every class has its share, up to one."""
    labels = backtrail.select_coreset(run, 0.5, method=method)["label"].to_numpy()
    for count in range(1, len(labels)):
        shares = np.bincount(labels[:count], minlength=CLASSES)
        assert np.abs(shares - count * np.array([8, 6, 4, 2]) / 20).max() <= 1


def test_any_fraction_counts_samples(run: Run) -> None:
    """A fraction gives from one sample to all."""
    for fraction, count in ((1e-9, 1), (0.1, 4), (0.26, 10), (1.0, ROWS)):
        assert len(backtrail.select_coreset(run, fraction, method="random")) == count
    everything = backtrail.select_coreset(run, 1.0)
    assert sorted(everything["sample"]) == list(range(ROWS))


def test_scores_order_what_is_kept(run: Run) -> None:
    """EL2N keeps the largest scores and "loss" the smallest."""
    state = run.state(run.steps)
    inputs, labels, _ = run.task.data.tensors
    outputs = torch.func.functional_call(run.task.model, state.params, (inputs,))
    losses = cross_entropy(outputs, labels, reduction="none").double().numpy()
    kept = backtrail.select_coreset(run, 0.25, method="loss", balanced=False)
    assert kept["sample"].to_list() == np.argsort(losses, kind="stable")[:10].tolist()
    np.testing.assert_allclose(kept["score"], np.sort(losses)[:10], rtol=1e-5)
    hard = backtrail.select_coreset(run, 0.25, method="el2n", balanced=False)["score"].to_numpy()
    assert (np.diff(hard) <= 0).all()
    assert (
        hard[-1]
        >= backtrail.select_coreset(run, 1.0, method="el2n")["score"].sort(descending=True)[9]
    )


def test_it_may_choose_among_some(run: Run) -> None:
    """Among some samples the fraction is still that of all samples."""
    among = backtrail.select_coreset(run, 0.5, method="loss")
    kept = backtrail.select_coreset(run, 0.2, among=among)
    assert set(kept["sample"]) <= set(among["sample"])
    assert kept["label"].value_counts().sort("label")["count"].to_list() == [3, 2, 2, 1]
    assert backtrail.select_coreset(run, 0.2, among=among["sample"].to_list()).equals(kept)
    assert set(backtrail.select_coreset(run, 0.9, among=among)["sample"]) == set(among["sample"])
    with pytest.raises(UnknownSample):
        backtrail.select_coreset(run, among=[0, ROWS])


def test_random_draws_follow_the_seed(run: Run) -> None:
    """Another seed draws other samples."""
    first, second = (
        set(backtrail.select_coreset(run, method="random", seed=seed)["sample"]) for seed in (0, 1)
    )
    assert first != second


def test_an_influence_or_embeddings_at_hand_choose_as_their_method(run: Run) -> None:
    """Given influence or embeddings select what their method would select."""
    queries = backtrail.Loss(run.task.data, samples=[0, 20, 39])
    influence = backtrail.DIT().attribute(run, queries)
    table = backtrail.select_coreset(run, method=influence)
    assert table.equals(backtrail.select_coreset(run, queries=queries, method="dit"))
    expected = influence.total()[:, -1].mean(axis=0)[table["sample"].to_numpy()]
    np.testing.assert_allclose(table["score"], expected)
    embeddings = backtrail.DataValueEmbedding().embed(run)
    for asked_too in (None, queries):
        named = backtrail.select_coreset(run, queries=asked_too, method="dve")
        assert backtrail.select_coreset(run, queries=asked_too, method=embeddings).equals(named)
    assert named["score"].null_count() == 0


def test_a_row_has_no_say_about_itself(run: Run) -> None:
    """The influence of a row on its own training loss is left out of its score."""
    table = backtrail.select_coreset(run, 1.0, method="dit")
    total = backtrail.DIT().attribute(run, backtrail.Loss(run.task.data)).total()[:, -1]
    np.fill_diagonal(total, 0.0)
    np.testing.assert_allclose(
        table.sort("sample")["score"], total.mean(axis=0), rtol=1e-6, atol=1e-9
    )


def test_herding_takes_what_brings_the_sum_closest() -> None:
    """Herding is greedy, and its mean is closer to that of all than 90 % of subsets."""
    vectors = np.random.default_rng(0).normal(size=(9, 3))
    goal = vectors.mean(axis=0)
    left = set(range(9))
    found: list[int] = []
    for place in range(4):
        sums = {row: vectors[[*found, row]].sum(axis=0) for row in left}
        best = min(sums, key=lambda row: float(np.linalg.norm((place + 1) * goal - sums[row])))
        found.append(best)
        left.remove(best)
    assert herded(vectors, 4).tolist() == found
    gaps = [
        np.linalg.norm(vectors[list(some)].mean(axis=0) - goal)
        for some in combinations(range(9), 4)
    ]
    assert np.mean(np.array(gaps) < np.linalg.norm(vectors[found].mean(axis=0) - goal)) < 0.1


def test_quotas_add_up() -> None:
    """Quotas are proportional, rounded, and never above the sizes."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        sizes = draw.integers(1, 30, 5)
        count = int(draw.integers(1, sizes.sum() + 1))
        found = quotas(sizes, count)
        assert found.sum() == count
        assert (found <= sizes).all()
        assert np.abs(found - sizes * count / sizes.sum()).max() < 1


def test_features_are_the_inputs_of_the_last_layer(run: Run) -> None:
    """The features are the outputs of all layers but the last."""
    params = run.state(run.steps).params
    hidden = torch.tanh(run.task.data.tensors[0] @ params["0.weight"].T + params["0.bias"])
    np.testing.assert_allclose(last_inputs(run, run.steps), hidden, rtol=1e-5, atol=1e-6)


def test_samples_with_ids_are_told_by_their_ids(tmp_path: Path) -> None:
    """Samples with ids are named by them, and training losses are refused as queries."""
    run = made(tmp_path / "run", ids=True)
    table = backtrail.select_coreset(run, 0.5, method="dve")
    assert table["sample"].is_between(100, 100 + ROWS - 1).all()
    assert (
        table["label"].to_list()
        == run.task.data.tensors[1][table["sample"].to_numpy() - 100].tolist()
    )
    with pytest.raises(
        RowsNotReadable, match="Give queries=, or a method that needs none \\('dve', 'random'"
    ):
        backtrail.select_coreset(run, method="dit")


def test_a_training_without_classes_is_not_balanced(tmp_path: Path) -> None:
    """A regression has no labels, and balancing it is refused."""
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 2, generator=draw), torch.arange(12.0)[:, None])
    model = nn.Linear(2, 1)
    task = backtrail.regression(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(
        tmp_path / "run", task, optimizer, checkpoints=backtrail.Every(2)
    ) as recorder:
        for inputs, targets in recorder.watch(DataLoader(data, 4)):
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    table = backtrail.select_coreset(run, 0.5)
    assert table.columns == ["sample", "score", "rank"]
    assert len(table) == 6
    with pytest.raises(NoClasses):
        backtrail.select_coreset(run, balanced=True)


def test_samples_never_seen_are_not_kept(tmp_path: Path) -> None:
    """The fraction is one of the samples that the training has seen."""
    table = backtrail.select_coreset(
        recorded_run("twice in a batch", tmp_path), 1.0, queries=standard_queries(), method="dit"
    )
    assert sorted(table["sample"]) == [0, 1, 2, 3, 4]


def test_what_makes_no_sense_is_refused(run: Run, tmp_path: Path) -> None:
    """Invalid fractions and methods, and influence of another run, are refused."""
    for fraction in (0.0, -0.1, 1.1):
        with pytest.raises(BadSetting, match="fraction"):
            backtrail.select_coreset(run, fraction, method="random")
    with pytest.raises(BadSetting, match="'dve', 'dit'"):
        backtrail.select_coreset(run, method="dvee")
    other = made(tmp_path / "other")
    with pytest.raises(OtherRun):
        backtrail.select_coreset(
            run,
            method=backtrail.DIT().attribute(other, backtrail.Loss(other.task.data, samples=[0])),
        )
    with pytest.raises(EmbeddedElsewhere):
        backtrail.select_coreset(run, method=backtrail.DataValueEmbedding().embed(other))
