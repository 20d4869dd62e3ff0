"""Gradients captured while a training runs are those of a replay, and the training is unchanged."""

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import DamagedFile, NotCaptured
from backtrail.methods.dve.live.hooks import BatchHooks
from backtrail.run.run import Run
from backtrail.run.store import Store
from tests.cases import ADAMW, CASES, SGD, Case, mlp, normed, one_group, rows
from tests.loops import backward, refused
from tests.methods.dve.live_training import (
    assert_same_as_replayed,
    captured_case,
    captured_files,
    captured_training,
    projected,
    without_capture,
)
from tests.persample.layers import LAYERS, SLOTS, Layer, Mapped, nonlinear_loss, table
from tests.processes import in_fresh_process

SEPARABLE = [case for case in CASES if case.model is not normed]


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rates be predicted for models as small as these, too."""
    monkeypatch.setattr("backtrail.methods.dve.live.early_rates.WAITING_ENTRIES", 9)


@pytest.mark.parametrize("case", SEPARABLE, ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"drawn": 0.4}, {"fisher": "empirical"}], ids=["true", "part", "empirical"]
)
def test_it_is_what_a_replay_finds(case: Case, settings: dict[str, Any], tmp_path: Path) -> None:
    """It is right for all optimizers, accumulation, clipping, penalty and kinds of parameters."""
    made = projected(**settings)
    assert_same_as_replayed(captured_case(case, tmp_path / "run", made), made)


@pytest.mark.parametrize(
    "settings", [{"projection": "mask"}, {"follow": "rate"}, {"layers": "together", "segments": 2}]
)
def test_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    """The capture is right for other projections, rates, blocks and segments."""
    made = projected(**settings)
    assert_same_as_replayed(
        captured_case(Case("adamw", one_group(ADAMW, lr=0.01)), tmp_path / "run", made), made
    )


def train(layer: Layer, path: Path, **options: Any) -> Run:
    """Record three steps of a model with one layer."""
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        model = layer.model()
        inputs = torch.cat([layer.inputs() for _ in range(3)])
    finally:
        torch.set_default_dtype(torch.float32)
    data = TensorDataset(inputs, torch.randn(len(inputs), dtype=torch.float64))
    task = backtrail.Task(model, data, nonlinear_loss)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with backtrail.Recorder(path, task, optimizer, **options) as recorder:
        for batch in recorder.watch(DataLoader(data, batch_size=SLOTS)):
            backward(nonlinear_loss(model(batch[0]), batch).mean())
            optimizer.step()
            optimizer.zero_grad()
    return backtrail.open_run(path, task)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_kind_of_layer(layer: Layer, tmp_path: Path) -> None:
    """The capture of every layer is right; BatchNorm and layers without a rule are refused."""
    made = projected(fisher="empirical")
    if layer.slow or layer.name == "batchnorm":
        with refused(NotCaptured, "Step 0", "Record without capture="):
            train(layer, tmp_path / "run", capture=made)
    else:
        assert_same_as_replayed(train(layer, tmp_path / "run", capture=made), made)


def test_batchnorm_in_eval_mode(tmp_path: Path) -> None:
    """BatchNorm in eval mode is captured."""
    data = rows()
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].eval()
    run = trained(model, data, tmp_path / "run", capture=projected())
    assert_same_as_replayed(run, projected())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]) -> None:
    """Make one step."""
    backward(cross_entropy(model(batch[0]), batch[1]))
    optimizer.step()
    optimizer.zero_grad()


def trained(
    model: nn.Module,
    data: TensorDataset,
    path: Path,
    *,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Run:
    """Record two epochs of AdamW; `call` is called instead of the model."""
    task = backtrail.classification(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with backtrail.Recorder(path, task, optimizer, **options) as recorder:
        for _ in range(2):
            for inputs, labels in recorder.watch(DataLoader(data, batch_size=3)):
                backward(cross_entropy((call or model)(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(path, task)


def test_a_model_that_is_called_twice_a_batch(tmp_path: Path) -> None:
    """Both calls of the model by `predict` are captured, and one without gradients is not."""

    def both(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        found: Tensor = model(batch[0]) + model(-batch[0])
        return found

    data = rows()
    model = mlp().double()
    task = backtrail.Task(
        model, data, lambda out, batch: cross_entropy(out, batch[1], reduction="none"), predict=both
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = projected(fisher="empirical")
    with backtrail.Recorder(tmp_path / "run", task, optimizer, capture=made) as recorder:
        for batch in recorder.watch(DataLoader(data, batch_size=3)):
            with torch.no_grad():
                model(batch[0])  # a look at the model is none of the batch's passes
            backward(cross_entropy(both(model, batch), batch[1]))
            optimizer.step()
            optimizer.zero_grad()
    assert_same_as_replayed(backtrail.open_run(tmp_path / "run", task), made)


def test_two_steps_on_one_batch(tmp_path: Path) -> None:
    """Two steps on one batch are captured as two."""
    task, optimizer, recorder, loader = captured_training(tmp_path / "run")
    with recorder:
        for batch in recorder.watch(loader):
            step(task.model, optimizer, batch)
            step(task.model, optimizer, batch)
    run = backtrail.open_run(tmp_path / "run", task)
    assert run.steps == 6
    assert_same_as_replayed(run, projected())


def test_what_the_loop_feeds_instead(tmp_path: Path) -> None:
    """The batch that the loop gives to `recorder.fed` is the one that is captured."""
    task, optimizer, recorder, loader = captured_training(tmp_path / "run")
    with recorder:
        for inputs, labels in recorder.watch(loader):
            noisy = [inputs + 0.1 * torch.randn_like(inputs), labels]
            recorder.fed(noisy)
            step(task.model, optimizer, noisy)
    assert_same_as_replayed(backtrail.open_run(tmp_path / "run", task), projected())


def test_under_autocast(tmp_path: Path) -> None:
    """Under bfloat16 autocast the capture is within 5 % of a replay in full precision."""
    data = TensorDataset(rows().tensors[0].float(), rows().tensors[1])
    model = mlp()

    def coarse(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = model(inputs)
        return found.float()

    run = trained(model, data, tmp_path / "run", call=coarse, capture=projected(fisher="empirical"))
    ours, theirs = (
        projected(fisher="empirical").embed(one).values() for one in (run, without_capture(run))
    )
    assert 0 < np.linalg.norm(ours - theirs) <= 0.05 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "made_of", [nn.functional.dropout, lambda table: table.mul(2.0).softmax(-1)]
)
def test_what_is_made_of_parameters_alone(
    made_of: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """A tensor computed from parameters alone is recomputed, with the same random numbers."""
    layer = Layer(
        "made", lambda: Mapped(lambda m, x: torch.tanh(x + made_of(m.p)), p=torch.randn(1, 5, 4))
    )
    assert_same_as_replayed(
        train(layer, tmp_path / "run", capture=projected(fisher="empirical")),
        projected(fisher="empirical"),
    )


def bits_of(
    capture: backtrail.DataValueEmbedding | None, path: Path
) -> tuple[list[bytes], list[int]]:
    """Train with dropout; return the final parameters and the state of the random generator."""
    torch.manual_seed(1)
    model = nn.Sequential(table(9), nn.Dropout(0.3), nn.Flatten(), nn.Linear(12, 3))
    data = TensorDataset(torch.randint(0, 9, (12, 3)), torch.randint(0, 3, (12,)))
    trained(model, data, path, capture=capture)
    return [
        p.detach().numpy().tobytes() for p in model.parameters()
    ], torch.get_rng_state().tolist()


def is_untouched(path: Path) -> None:
    """Assert that a training ends in the same bits with and without a capture."""
    alone = bits_of(None, path / "alone")
    for fisher in ("true", "empirical"):
        assert bits_of(projected(fisher=fisher), path / fisher) == alone


def test_the_training_keeps_its_bits(tmp_path: Path) -> None:
    """A capture changes neither weights nor random numbers, with sampled labels or without."""
    in_fresh_process(is_untouched, tmp_path)


def test_what_was_lost_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose captured file is missing are replayed."""
    monkeypatch.setattr("backtrail.methods.dve.live.files.FILE_STEPS", 2)
    run = captured_case(Case("adamw", one_group(ADAMW, lr=0.01)), tmp_path / "run", projected())
    assert captured_files(run) == [f"rows/{first:08d}.safetensors" for first in (0, 2, 4)]
    truth = projected().embed(without_capture(run)).values()
    for lost in captured_files(run):
        files = {name: hash for name, hash in run.manifest.files.items() if name != lost}
        shorter = Run(
            Store(run.path, msgspec.structs.replace(run.manifest, files=files)), run.task, run.log
        )
        found = projected().embed(shorter).values()
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-11 * np.abs(truth).max())


def test_a_loop_that_fails_keeps_what_was_captured(tmp_path: Path) -> None:
    """An exception in the loop keeps all complete steps, and removes the hooks from the model."""
    task, optimizer, recorder, loader = captured_training(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), recorder:
        for number, batch in enumerate(recorder.watch(loader)):
            if number == 2:
                raise KeyboardInterrupt
            step(task.model, optimizer, batch)
    assert not task.model._forward_hooks
    run = backtrail.open_run(tmp_path / "run", task)
    assert run.steps == 2
    assert_same_as_replayed(run, projected())


def test_other_settings_are_replayed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A capture for other settings is not used, and the log says so."""
    run = captured_case(Case("sgd", one_group(SGD, lr=0.3)), tmp_path / "run", projected(rank=4))
    with caplog.at_level(logging.WARNING):
        found = projected(rank=6).embed(run).values()
    np.testing.assert_array_equal(found, projected(rank=6).embed(without_capture(run)).values())
    assert "was captured with rank=4" in caplog.text


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """A damaged file is found by its checksum, and the message names it."""
    run = captured_case(Case("sgd", one_group(SGD, lr=0.3)), tmp_path / "run", projected())
    (file,) = captured_files(run)
    content = bytearray((run.path / file).read_bytes())
    content[-1] ^= 1
    (run.path / file).write_bytes(content)
    with refused(DamagedFile, file, "checksum"):
        projected().embed(run)


def test_a_model_that_is_not_called_as_a_whole_is_refused(tmp_path: Path) -> None:
    """A loop that calls the layers one by one is refused, as the model's hooks do not run."""
    model = mlp().double()
    with refused(NotCaptured, "Step 0", "was not seen"):
        trained(
            model,
            rows(),
            tmp_path / "run",
            call=lambda x: model[2](model[1](model[0](x))),
            capture=projected(),
        )


def is_refused_compiled(path: Path) -> None:
    """Assert that a loop that calls the compiled model is refused."""
    model = mlp().double()
    wrapped = torch.compile(model, backend="eager")
    with refused(NotCaptured, "Step 0", "eagerly"):
        trained(model, rows(), path, call=wrapped, capture=projected())


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    """A compiled model is refused at its first step."""
    in_fresh_process(is_refused_compiled, tmp_path / "run")


def test_a_copy_of_the_model_is_not_listened_to(tmp_path: Path) -> None:
    """Calls of a copy of the model, such as an average of the weights, are not captured."""
    task, optimizer, recorder, loader = captured_training(tmp_path / "run")
    with recorder:
        average = torch.optim.swa_utils.AveragedModel(task.model)
        for inputs, labels in recorder.watch(loader):
            average(-inputs)
            step(task.model, optimizer, [inputs, labels])
            average.update_parameters(task.model)
    assert_same_as_replayed(backtrail.open_run(tmp_path / "run", task), projected())


def test_nothing_of_a_batch_outlives_its_step(tmp_path: Path) -> None:
    """No reference cycle holds a batch's graph after its step."""
    task, optimizer, recorder, loader = captured_training(tmp_path / "run")
    heard: list[weakref.ref[Any]] = []
    real = BatchHooks.leave

    def noting(self: BatchHooks, output: Any) -> None:
        real(self, output)
        heard.append(weakref.ref(self._tracer.uses[0]))

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch, recorder:
            patch.setattr(BatchHooks, "leave", noting)
            for batch in recorder.watch(loader):
                step(task.model, optimizer, batch)
                assert [ref() for ref in heard[:-1] if ref() is not None] == []
        assert len(heard) == 3
        assert [ref() for ref in heard if ref() is not None] == []
    finally:
        gc.enable()
