"""Copies of the model, the task, the run and its results, inside and outside of a recording."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import ComplexParameter, NotEntered, RenormalizedEmbedding, SeveralLabels


def rows() -> TensorDataset:
    """Eight rows of three numbers, in two classes."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(8, 3, generator=generator), torch.arange(8) % 2)


@pytest.mark.parametrize("capture", [None, backtrail.DataValueEmbedding(rank=2)])
def test_a_model_can_be_stored_and_copied_in_the_recorded_loop(
    capture: backtrail.DataValueEmbedding | None, tmp_path: Path
) -> None:
    """The copies work, and what they do is no part of the recording."""
    data = rows()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.classification(model, data)
    with backtrail.Recorder(tmp_path / "run", task, optimizer, capture=capture) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=4)):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            stored = io.BytesIO()
            torch.save(model, stored)
            stored.seek(0)
            for twin in (torch.load(stored, weights_only=False), copy.deepcopy(model)):
                assert torch.equal(twin(inputs), model(inputs))
                twin(inputs).sum().backward()
            optimizer.step()
    run = backtrail.open_run(tmp_path / "run", task)
    assert run.steps == 2
    assert run.verify().difference == 0


def test_a_recorder_without_with_is_refused(tmp_path: Path) -> None:
    """The first watched batch says that nothing would be recorded, before any step is made."""
    data = rows()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = backtrail.Recorder(
        tmp_path / "run", backtrail.classification(model, data), optimizer
    )
    loader = recorder.watch(DataLoader(data, batch_size=4))
    with pytest.raises(NotEntered, match=r"with backtrail\.Recorder"):
        next(iter(loader))
    with recorder:
        next(iter(loader))
    with pytest.raises(NotEntered, match="outside of its `with` block"):
        next(iter(loader))


def test_complex_parameters_are_refused(tmp_path: Path) -> None:
    """Before the training, and with what to do."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ComplexParameter, match=r"'weight' is torch\.complex64.*view_as_real"):
        backtrail.Recorder(tmp_path / "run", backtrail.classification(model, rows()), optimizer)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_write_to_their_weight_are_refused(
    kind: type[nn.Embedding | nn.EmbeddingBag], tmp_path: Path
) -> None:
    """With `max_norm` the forward pass changes what the optimizer trains."""
    model = nn.Sequential(kind(5, 3, max_norm=1.0), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.classification(model, rows())
    with pytest.raises(RenormalizedEmbedding, match=r"'0' has max_norm=1\.0.*max_norm=None"):
        backtrail.Recorder(tmp_path / "run", task, optimizer)
    others = torch.optim.SGD(model[1].parameters(), lr=0.1)
    backtrail.Recorder(tmp_path / "run", task, others)


def test_labels_of_pixels_are_refused(tmp_path: Path) -> None:
    """A classification has one label per row; the error shows a loss for several."""
    data = TensorDataset(torch.randn(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.long))
    model = nn.Conv2d(3, 2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.classification(model, data)
    with (
        pytest.raises(SeveralLabels, match=r"losses of shape \[4, 2, 2\].*flatten\(1\).mean\(1\)"),
        backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder,
    ):
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=4)):
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def test_tasks_runs_and_results_can_be_pickled(tmp_path: Path) -> None:
    """Pickled and copied, they give the same numbers."""
    data = rows()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.classification(model, data)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=4)):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    run = backtrail.open_run(tmp_path / "run", task)
    queries = backtrail.Loss(data, samples=[0, 3])
    in_memory = backtrail.DIT().attribute(run, queries)
    on_disk = backtrail.DIT().attribute(run, queries, out=tmp_path / "influence")
    embeddings = backtrail.DataValueEmbedding(rank=2).embed(run)
    for twin in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        again = backtrail.DIT().attribute(twin, copy.deepcopy(queries))
        np.testing.assert_array_equal(again.values(), in_memory.values())
    kept: list[Any] = [in_memory, on_disk]
    for influence in kept:
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(influence)).total(), on_disk.total()
        )
    unpickled = pickle.loads(pickle.dumps(embeddings))
    np.testing.assert_array_equal(unpickled.summed(), embeddings.summed())
    others: list[Any] = [
        backtrail.regression(model, data),
        backtrail.retrain(run, queries, [[0]]),
        backtrail.trust(run, in_memory, removals=2),
    ]
    for other in others:
        assert repr(pickle.loads(pickle.dumps(other))) == repr(other)


def test_a_folder_answers_for_its_own_queries_alone(tmp_path: Path) -> None:
    """Queries of the same names with other values do not resume it; the same ones do."""
    data = rows()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.classification(model, data)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=4)):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    run = backtrail.open_run(tmp_path / "run", task)
    other = TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    methods: list[backtrail.Method] = [
        backtrail.DIT(),
        backtrail.TracIn(),
        backtrail.DataValueEmbedding(rank=2),
        backtrail.DiffIn(2),
    ]
    for number, method in enumerate(methods):
        out = tmp_path / str(number)
        first = method.attribute(run, backtrail.Loss(data, samples=[0]), out=out)
        again = method.attribute(run, backtrail.Loss(data, samples=[0]), out=out)
        np.testing.assert_array_equal(first.values(), again.values())
        with pytest.raises(backtrail.errors.DifferentInfluence, match="values of the queries"):
            method.attribute(run, backtrail.Loss(other, samples=[0]), out=out)
