"""Compiled sweeps give the ordinary numbers, and know when they are not worth it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import whence
from tests.cases import ADAMW, CASES, CLASSES, FEATURES, Case, one_group, record, rows
from tests.methods.test_dit import recorded
from tests.methods.test_exact import asked
from whence.methods import compiling
from whence.replay.curvature import Curvature
from whence.replay.reverse import Rules
from whence.run.run import Run

ALWAYS = whence.DIT(compiled="always", chunk=2)
TRACED = [
    "batchnorm, adamw",
    "accumulation, batchnorm",
    "penalty",
    "frozen",
    "tied, adamw",
    "short batches",
    "clip norm",
]
NAMES = [case.name for case in CASES]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Takes the traced graphs as they are, so that no C++ is compiled; counts them."""
    graphs: list[Any] = []

    def keep(graph: Callable[..., Any], *, dynamic: bool, options: object) -> Callable[..., Any]:
        assert not dynamic
        del options
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", keep)
    return graphs


@pytest.mark.parametrize("policy", [whence.Hessian(), whence.GaussNewton(), whence.EmpiricalFisher()], ids=repr)
@pytest.mark.parametrize("name", [name for name in TRACED if name in NAMES])
def test_traced_products_are_the_ordinary_ones(
    name: str, policy: Curvature, tmp_path: Path, traced_only: list[Any]
) -> None:
    """Three queries by programs for two, of every kind of piece."""
    run = recorded(name, tmp_path)
    plain = whence.DIT(curvature=policy).attribute(run, asked(), observed_at="epochs").values()
    found = replace(ALWAYS, curvature=policy).attribute(run, asked(), observed_at="epochs")
    assert traced_only
    assert found.settings["compiled"] is True
    np.testing.assert_allclose(found.values(), plain, rtol=0, atol=1e-11 * np.abs(plain).max())


def test_every_kind_of_piece_has_one_program(tmp_path: Path, traced_only: list[Any]) -> None:
    """Steps of one shape share theirs, whatever their batches hold."""
    ALWAYS.attribute(recorded("adamw", tmp_path), asked())
    assert len(traced_only) == 1


def test_dropout_is_left_as_it_is(tmp_path: Path, traced_only: list[Any]) -> None:
    """A graph knows no state of the generators."""

    def dropping() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(0.4), nn.Linear(5, CLASSES))

    case, data = Case("dropout", one_group(ADAMW, lr=0.01), model=dropping), rows()
    model = case.built()
    record(case, model, data, tmp_path / "run")
    run = whence.open_run(tmp_path / "run", case.task(model, data))
    assert (ALWAYS.attribute(run, asked()).values() == whence.DIT(chunk=2).attribute(run, asked()).values()).all()
    assert not traced_only


class Branching(nn.Module):
    """Goes one of two ways by what it sees, which no graph can."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[slot, feature] to [slot]."""
        return self.layer(x)[:, 0] * (2 if bool((x > 0).any()) else 3)


def branching(folder: Path) -> Run:
    """A short training of such a model."""
    torch.manual_seed(0)
    model, data = Branching(), TensorDataset(torch.randn(8, 2), torch.randn(8))
    task = whence.Task(model, data, lambda outputs, batch: (outputs - batch[1]) ** 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with whence.Recorder(folder, task, optimizer) as recorder:
        for x, y in recorder.watch(DataLoader(data, batch_size=4)):
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return whence.open_run(folder, task)


def test_models_that_look_at_their_masks_are_traced(
    tmp_path: Path, traced_only: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A GPT-2 of `transformers` looks at numbers unless it is told that it is being compiled."""
    transformers = pytest.importorskip("transformers", reason="pip install 'whence[hf]'")
    torch.manual_seed(0)
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"n_positions": 5, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
    config = transformers.GPT2Config(**size, **still, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config)
    data = TensorDataset(torch.randint(11, (8, 5)), torch.randint(11, (8, 5)))
    task, optimizer = whence.language_model(model, data), torch.optim.AdamW(model.parameters(), lr=1e-2)
    with whence.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for tokens, targets in recorder.watch(DataLoader(data, batch_size=4)):
            cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    run, query = whence.open_run(tmp_path / "run", task), whence.Loss(data, samples=[0, 1])
    found = ALWAYS.attribute(run, query)
    assert len(traced_only) == 1
    assert "cannot be compiled" not in caplog.text
    np.testing.assert_allclose(found.values(), whence.DIT(chunk=2).attribute(run, query).values(), rtol=1e-3, atol=1e-6)


def test_what_cannot_be_traced_goes_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a word why, and the ordinary numbers."""
    run = branching(tmp_path / "run")
    query = whence.Loss(run.task.data, samples=[0, 1])
    found = ALWAYS.attribute(run, query).values()
    assert "cannot be compiled" in caplog.text
    assert (found == whence.DIT(chunk=2).attribute(run, query).values()).all()


def test_a_program_that_is_wrong_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is compared with the ordinary product before it is used."""

    def wrong(graph: Callable[..., list[Tensor]], *, dynamic: bool, options: object) -> Callable[..., list[Tensor]]:
        del dynamic, options
        return lambda *tensors: [1.001 * tensor for tensor in graph(*tensors)]

    monkeypatch.setattr(torch, "compile", wrong)
    run = recorded("adamw", tmp_path)
    found = ALWAYS.attribute(run, asked()).values()
    assert "differs by" in caplog.text
    assert (found == whence.DIT(chunk=2).attribute(run, asked()).values()).all()


def _seconds(run: whence.Run, rules: Rules, rows: int, *, chunk: int, step: int, compiled: float) -> float:
    """What a step of a million seconds takes with programs."""
    assert step < run.steps
    assert chunk == (1 if rules.programs is None else rows)
    return 1e6 if rules.programs is None else compiled


def test_long_asks_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Programs only where they save more than they take, for the sizes of batch that are common."""
    run, rules = recorded("adamw", tmp_path), Rules(whence.Hessian(), whence.Tangent())
    with caplog.at_level(logging.INFO):
        assert compiling.programs(run, rules, 2, chunk=2, ordinary=1, compiled="long") is None
    assert "compiling would save about 0 s" in caplog.text
    monkeypatch.setattr(compiling, "RARE", 1)
    for compiled, taken in ((5e5, True), (2e6, False)):
        seconds = partial(_seconds, compiled=compiled)
        monkeypatch.setattr(compiling, "seconds_of_a_step", seconds)
        assert (compiling.programs(run, rules, 2, chunk=2, ordinary=1, compiled="long") is not None) == taken
    assert compiling.programs(run, rules, 2, chunk=2, ordinary=1, compiled="never") is None


def test_an_attribution_that_was_begun_goes_on_as_it_was(tmp_path: Path, traced_only: list[Any]) -> None:
    """Compiled or not, whatever is asked for now."""
    run = recorded("adamw", tmp_path)
    begun = ALWAYS.attribute(run, asked(), out=tmp_path / "compiled")
    assert (whence.DIT(chunk=2).attribute(run, asked(), out=tmp_path / "compiled").values() == begun.values()).all()
    whence.DIT(chunk=2).attribute(run, asked(), out=tmp_path / "plain")
    count = len(traced_only)
    assert "compiled" not in ALWAYS.attribute(run, asked(), out=tmp_path / "plain").settings
    assert len(traced_only) == count


def test_another_word_is_refused() -> None:
    """At once."""
    with pytest.raises(whence.WhenceError, match="'never', 'long' or 'always'"):
        compiling.check_compiled("perhaps")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize("policy", [whence.Hessian(), whence.GaussNewton()], ids=repr)
def test_compiled_for_real(policy: Curvature, tmp_path: Path) -> None:
    """By torch's own compiler, on a network with BatchNorm."""
    run = recorded("batchnorm, adamw", tmp_path)
    plain = whence.DIT(curvature=policy).attribute(run, asked()).values()
    found = replace(ALWAYS, curvature=policy).attribute(run, asked()).values()
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-9 * np.abs(plain).max())
