"""Data Value Embedding against what it approximates, and its files."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import backtrail
from backtrail.errors import (
    BadSetting,
    DamagedEmbeddings,
    DifferentEmbeddings,
    EmbeddedElsewhere,
    EmbeddingGrew,
    FolderTaken,
    NoDraw,
    NotEmbedded,
    NotEmbeddings,
    UnfinishedEmbeddings,
)
from backtrail.influence.tables import Order
from backtrail.methods.dve.gather import Walk
from backtrail.methods.dve.projection import Kind
from backtrail.methods.dve.store import EmbeddingStore
from backtrail.step.state import State
from tests.cases import SGD, Case, decay, one_group
from tests.interruption import Interrupted
from tests.methods.dve.unprojected import relative_error, unprojected
from tests.oracles.value_embedding import adamw_embeddings
from tests.recorded_runs import recorded_case, recorded_run
from tests.standard_queries import standard_queries


def small(**settings: Any) -> backtrail.DataValueEmbedding:
    """Return the method with a projection that loses something."""
    chosen: dict[str, Any] = {"rank": 6, "projection": "gaussian", "damping": 0.5}
    return backtrail.DataValueEmbedding(**chosen | settings)


def by_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make an SGD with one group of weights and one of biases, which splits every layer."""
    weights, biases = ([p for p in model.parameters() if p.dim() == axes] for axes in (2, 1))
    return torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}], lr=0.2
    )


PLAIN = [
    Case("sgd", one_group(SGD, lr=0.3)),
    Case("decay", one_group(SGD, lr=0.3, weight_decay=0.2)),
    Case("groups", by_groups),
    Case("penalty", one_group(SGD, lr=0.3), penalty=decay),
    Case("twice in a batch", one_group(SGD, lr=0.3), batches=[[0, 0, 1], [2, 3, 2], [0, 4, 4]]),
    Case("accumulation", one_group(SGD, lr=0.3), accumulate=2),
    Case("clip value", one_group(SGD, lr=0.3), clip=backtrail.ClipValue(0.1)),
    Case("climbing", one_group(SGD, lr=0.05, maximize=True)),
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("projection", ["orthonormal", "mask"])
def test_at_full_rank_it_is_the_sweep_with_the_empirical_fisher(
    case: Case, projection: str, tmp_path: Path
) -> None:
    """Under SGD, at full rank, the influence is that of DIT with the empirical Fisher matrix."""
    run = recorded_case(case, tmp_path)
    states = [1, run.steps]
    truth = (
        backtrail.DIT(curvature=backtrail.EmpiricalFisher())
        .attribute(run, standard_queries(), observed_at=states)
        .values()
    )
    found = unprojected(fisher="empirical", projection=projection).attribute(
        run, standard_queries(), observed_at=states
    )
    assert relative_error(found.values(), truth) <= 1e-8


@pytest.mark.slow
def test_drawn_labels_are_the_gauss_newton_matrix_on_average(tmp_path: Path) -> None:
    """With sampled labels the mean over 60 seeds is DIT with Gauss-Newton, within its error."""
    run = recorded_run("sgd", tmp_path)
    truth = (
        backtrail.DIT(curvature=backtrail.GaussNewton()).attribute(run, standard_queries()).values()
    )
    draws = np.stack(
        [unprojected(seed=seed).attribute(run, standard_queries()).values() for seed in range(60)]
    )
    left = draws.std(0) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - truth) <= 4.5 * left + 1e-12).all()
    assert relative_error(draws.mean(0), truth) < 0.05 < relative_error(draws[0], truth)


def test_adamw_on_picked_entries_is_the_explicit_product(tmp_path: Path) -> None:
    """With a mask, AdamW's embeddings are the explicit product of the oracle."""
    case = Case("adamw", one_group(torch.optim.AdamW, lr=0.01, weight_decay=0.3))
    found = (
        unprojected(fisher="empirical", projection="mask")
        .embed(recorded_case(case, tmp_path))
        .values()
    )
    truth = torch.stack(adamw_embeddings(case, lr=0.01, decay=0.3)).numpy()
    names = [name for name, _ in case.built().named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]  # the order of the coordinates
    assert relative_error(found, truth) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", "gaussian"), ("sgd", "orthonormal"), ("adamw", "mask")]
)
def test_projections_are_right_on_average(name: str, kind: Kind, tmp_path: Path) -> None:
    """The scores of the last step, which need no recursion, are unbiased."""
    run = recorded_run(name, tmp_path)
    truth = unprojected(fisher="empirical").attribute(run, standard_queries()).values()[:, :, -1]
    many = [
        small(fisher="empirical", projection=kind, seed=seed).attribute(run, standard_queries())
        for seed in range(30)
    ]
    draws = np.stack([found.values()[:, :, -1] for found in many])
    left = draws.std(0) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - truth) <= 4.5 * left + 1e-12).all()


def test_layers_apart_leave_out_what_they_do_to_one_another(tmp_path: Path) -> None:
    """Treating layers apart changes nothing in the last step, and something in the first."""
    run = recorded_run("sgd", tmp_path)
    together = unprojected(fisher="empirical").attribute(run, standard_queries()).values()
    apart = (
        unprojected(fisher="empirical", layers="apart").attribute(run, standard_queries()).values()
    )
    assert relative_error(apart[..., -1, :], together[..., -1, :]) <= 1e-12
    assert 1e-3 < relative_error(apart[..., 0, :], together[..., 0, :]) < 1


def test_rows_and_columns_of_rates_come_near_to_those_of_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates factored by row and column are nearer to rates by entry than a single rate is."""
    run = recorded_run("adamw", tmp_path)
    exact = (
        unprojected(fisher="empirical", projection="mask")
        .attribute(run, standard_queries())
        .values()
    )
    monkeypatch.setattr("backtrail.methods.dve.step_features.picks", lambda _: False)
    factored = unprojected(fisher="empirical").attribute(run, standard_queries()).values()
    plain = (
        unprojected(fisher="empirical", follow="rate").attribute(run, standard_queries()).values()
    )

    def likeness(found: np.ndarray) -> float:
        return float(np.corrcoef(found.ravel(), exact.ravel())[0, 1])

    assert likeness(factored) > max(0.9, likeness(plain))


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_segments_change_nothing_but_what_can_be_observed(
    name: str, fisher: str, tmp_path: Path
) -> None:
    """Segments add observed states, whose influence is what an embedding towards them gives."""
    run = recorded_run(name, tmp_path)
    whole_run = small(fisher=fisher).embed(run)
    cut = small(fisher=fisher, segments=3).embed(run)
    assert cut.observed_at == (2, 4, 5)
    truth = whole_run.attribute(standard_queries()).values()
    assert relative_error(cut.attribute(standard_queries()).values(), truth) <= 1e-10
    states = [2, 4, run.steps]
    found = cut.attribute(standard_queries(), observed_at=states).values()
    again = (
        small(fisher=fisher)
        .embed(run, observed_at=states)
        .attribute(standard_queries(), observed_at=states)
        .values()
    )
    np.testing.assert_array_equal(found, again)
    assert (found[:, 0, 2:] == 0).all()
    assert np.abs(found[:, 0, :2]).max() > 0
    with pytest.raises(
        NotEmbedded, match=r"not built for state 3; available states: 2, 4, 5\. .*embed\(run, obs"
    ):
        cut.attribute(standard_queries(), observed_at=3)


def test_killed_anywhere_it_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any write and resumed, it has the same bits, and cannot be opened before."""
    run = recorded_run("adamw", tmp_path)
    truth = small(segments=2).embed(run, out=tmp_path / "whole").values()
    np.testing.assert_array_equal(small(segments=2).embed(run).values(), truth)
    monkeypatch.setattr("backtrail.methods.dve.store.SHORTEST_SHARD", 2)
    real = EmbeddingStore.write
    writes = 0

    def failing(self: EmbeddingStore, name: str, values: np.ndarray, start: int) -> None:
        nonlocal writes
        writes -= 1
        if not writes:
            raise Interrupted
        real(self, name, values, start)

    for survived in (1, 4, 9, 14, 22, 24, 27, 28):
        writes = survived
        out = tmp_path / f"out{survived}"
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddingStore, "write", failing)
            with pytest.raises(Interrupted):
                small(segments=2).embed(run, out=out)
        with pytest.raises(UnfinishedEmbeddings, match="unfinished"):
            backtrail.open_embeddings(out, run)
        np.testing.assert_array_equal(small(segments=2).embed(run, out=out).values(), truth)
        np.testing.assert_array_equal(backtrail.open_embeddings(out, run).values(), truth)
        assert not (out / "captured").exists()


@pytest.mark.parametrize("name", ["penalty", "clip norm, adamw", "batchnorm, adamw"])
def test_between_kept_states_it_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes between two stored states, and goes back to one only when it was interrupted."""
    run, begun, (real, mark) = (
        recorded_run(name, tmp_path),
        list[int](),
        (Walk.before, EmbeddingStore.mark_captured),
    )
    monkeypatch.setattr("backtrail.methods.dve.store.SHORTEST_SHARD", 3)

    def before(self: Walk, step: int) -> State:
        begun.append(step)
        return real(self, step)

    monkeypatch.setattr(Walk, "before", before)
    truth = small(fisher="empirical").embed(run).values()

    def failing(self: EmbeddingStore, shard: int) -> None:
        mark(self, shard)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "mark_captured", failing)
        with pytest.raises(Interrupted):
            small(fisher="empirical").embed(run, out=tmp_path / "out")
    assert 3 not in run.kept
    np.testing.assert_array_equal(
        small(fisher="empirical").embed(run, out=tmp_path / "out").values(), truth
    )
    assert begun == [0, 0, 3]


def test_on_disk_it_is_what_it_was(tmp_path: Path) -> None:
    """Opened from disk it gives the same influence, and a second call does not write it again."""
    run = recorded_run("two groups", tmp_path)
    made = small(segments=2).embed(run, out=tmp_path / "out")
    opened = backtrail.open_embeddings(tmp_path / "out", run)
    np.testing.assert_array_equal(
        opened.attribute(standard_queries()).values(), made.attribute(standard_queries()).values()
    )
    assert repr(opened) == repr(made)
    assert "5 steps x 3 slots" in repr(opened)
    assert opened.path == tmp_path / "out"
    before = (tmp_path / "out" / "done.json").stat().st_mtime_ns
    small(segments=2).embed(run, out=tmp_path / "out")
    assert (tmp_path / "out" / "done.json").stat().st_mtime_ns == before


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    """Folders with other settings, another run, something else or a damaged file are refused."""
    run = recorded_run("adamw", tmp_path)
    other = recorded_run("sgd", tmp_path)
    out = tmp_path / "out"
    small().embed(run, out=out)
    with pytest.raises(DifferentEmbeddings, match="seed: 0 in the folder, 1 now"):
        small(seed=1).embed(run, out=out)
    with pytest.raises(EmbeddedElsewhere, match=run.id):
        backtrail.open_embeddings(out, other)
    with pytest.raises(NotEmbeddings, match="no such folder"):
        backtrail.open_embeddings(tmp_path / "nowhere", run)
    asked_of = backtrail.open_embeddings(out, run).attribute(
        standard_queries(), out=tmp_path / "influence"
    )
    with pytest.raises(NotEmbeddings, match="backtrail influence"):
        backtrail.open_embeddings(tmp_path / "influence", run)
    assert asked_of.method == "DataValueEmbedding"
    with pytest.raises(FolderTaken):
        small().embed(run, out=run.path)
    next((out / "embedding").rglob("c/0/0/0")).unlink()
    with pytest.raises(DamagedEmbeddings, match="embedding/c/0/0/0"):
        backtrail.open_embeddings(out, run)


def test_the_best_samples_come_without_the_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`top` equals that of the influence, however many sums fit into memory."""
    run = recorded_run("adamw", tmp_path)
    embeddings = small(segments=2).embed(run)
    influence = embeddings.attribute(standard_queries())
    for size in (10**9, 1):
        monkeypatch.setattr("backtrail.methods.dve.embeddings.SUM_BYTES", size)
        for order in get_args(Order):
            found = embeddings.top(standard_queries(), 4, order=order)
            assert found.columns == ["query", "rank", "sample", "influence"]
            for name in influence.queries:
                truth = influence.top(4, query=name, order=order)
                one = found.filter(query=name)
                assert one["sample"].to_list() == truth["sample"].to_list()
                assert one["rank"].to_list() == [1, 2, 3, 4]
                np.testing.assert_allclose(one["influence"], truth["influence"], rtol=1e-9)


def test_neighbours_are_those_of_the_summed_vectors(tmp_path: Path) -> None:
    """The nearest samples are those with the largest cosine of summed embeddings."""
    run = recorded_run("momentum", tmp_path)
    cut = small(segments=2).embed(run)
    straight = small().embed(run)
    sums = np.zeros((run.samples, straight.about.rank))
    for step in run.log:
        for slot, sample in enumerate(step.samples):
            sums[sample] += straight.values()[step.index, slot]
    sizes = np.linalg.norm(sums, axis=1)
    cosine = sums @ sums[2] / np.where(sizes > 0, sizes, 1) / sizes[2]
    order = [int(sample) for sample in np.argsort(-cosine, kind="stable") if sample != 2]
    for embeddings in (cut, straight):
        found = embeddings.nearest(2, 5)
        assert found["sample"].to_list() == order[:5]
        np.testing.assert_allclose(found["similarity"], cosine[order[:5]], rtol=1e-9)
    with pytest.raises(backtrail.BacktrailError, match="no sample 9"):
        straight.nearest(9)


def before_batchnorm() -> torch.nn.Module:
    """Make a network with a bias that BatchNorm's mean cancels."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.GELU(), torch.nn.Linear(5, 3)
    )


def test_a_bias_in_front_of_batchnorm_has_no_part(tmp_path: Path) -> None:
    """A bias before BatchNorm, whose gradient is rounding, has a zero embedding."""
    case = Case("bias", one_group(torch.optim.AdamW, lr=0.003), model=before_batchnorm)
    run = recorded_case(case, tmp_path)
    embeddings = small().embed(run)
    first, last = embeddings.about.layout["0.bias"]
    assert (embeddings.values()[..., first:last] == 0).all()
    truth = backtrail.DIT().attribute(run, standard_queries()).values()
    assert (
        np.abs(embeddings.attribute(standard_queries()).values()).max() < 100 * np.abs(truth).max()
    )


def test_what_cannot_be_done_says_what_can(tmp_path: Path) -> None:
    """Invalid settings, averages, a task that cannot sample labels, and growth are refused."""
    run = recorded_run("sgd", tmp_path)
    for name, value in {"rank": 0, "damping": -1.0, "segments": 0}.items():
        with pytest.raises(BadSetting, match=f"Invalid {name}={value!r}: expected"):
            backtrail.DataValueEmbedding(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(BadSetting, match=r"backtrail\.DIT supports averages"):
        small().attribute(run, backtrail.Averaged(standard_queries(), 0.9))
    task = backtrail.Task(run.task.model, run.task.data, run.task.loss)
    with pytest.raises(NoDraw, match=r"Task\(draw=\.\.\.\)"):
        small().embed(backtrail.open_run(run.path, task))
    assert small(fisher="empirical").embed(backtrail.open_run(run.path, task)).about.rank
    wild = recorded_case(
        Case("wild", one_group(SGD, lr=300.0), batches=[[0, 1, 2], [3, 4, 5]] * 8),
        tmp_path / "wild",
    )
    with pytest.raises(EmbeddingGrew, match=r"At step \d+ the embeddings of '(0|2|all layers)'"):
        unprojected(fisher="empirical").embed(wild)
    assert np.isfinite(unprojected(fisher="empirical", damping=0.5).embed(wild).values()).all()
