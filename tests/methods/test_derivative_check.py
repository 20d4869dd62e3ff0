"""The check that an attribution makes of its own derivatives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import (
    BadSetting,
    LateSecondDerivative,
    NoSecondDerivative,
    WrongDerivative,
)
from backtrail.methods.derivative_check import check_derivatives
from backtrail.run.run import Run
from backtrail.task import true_derivatives
from tests.random_trainings import LAYERS, Training

SMOOTH = [
    Training(("tanh",), "cross-entropy"),
    Training(("batch norm", "gelu"), "squared error", "AdamW"),
    Training(("lstm",), "cross-entropy", "Adam", "warm-up from 0", accumulate=2),
    Training(("dropout", "layer norm"), "cross-entropy", "RMSprop", clip="norm"),
]
KINKED = [
    Training(("relu",), "cross-entropy", "AdamW"),
    Training(("max pooling", "leaky_relu"), "absolute error", "SGD, momentum"),
]
# What torch's own second derivative gets wrong in each, without `TrueDerivatives`.
WRONG = ["detach", "no_grad", ".data", "straight-through", "weight norm", "running mean", "queue"]


def recorded(training: Training, folder: Path) -> Run:
    """Record a training."""
    model, optimizer = training.start()
    clip = backtrail.ClipNorm(0.05) if training.clip == "norm" else None
    task = backtrail.Task(model, training.data, loss=training.row_losses, clip=clip)
    torch.manual_seed(training.seed + 1)
    with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Every(3)) as recorder:
        loader = DataLoader(training.data, batch_sampler=training.batches())
        training.run(model, optimizer, recorder.watch(loader))
    return backtrail.open_run(folder, task)


@pytest.mark.parametrize("training", SMOOTH, ids=str)
def test_smooth_trainings_pass(training: Training, tmp_path: Path) -> None:
    """The sweep agrees with differences of two steps."""
    assert check_derivatives(recorded(training, tmp_path / "run"), backtrail.Hessian()) == "passed"


@pytest.mark.parametrize("training", KINKED, ids=str)
def test_kinks_are_no_error(training: Training, tmp_path: Path) -> None:
    """Networks that are not smooth are never refused."""
    found = check_derivatives(recorded(training, tmp_path / "run"), backtrail.Hessian())
    assert found == "passed" or found.startswith("not checked: kinks")


@pytest.mark.parametrize("layer", WRONG)
def test_a_wrong_second_derivative_is_an_error(
    layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the true derivatives, each of these trainings is refused whatever the policy."""

    def plain(
        mode: TorchFunctionMode, function: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del mode
        return function(*args, **(kwargs or {}))

    monkeypatch.setattr(true_derivatives.TrueDerivatives, "__torch_function__", plain)
    run = recorded(Training((layer,), "cross-entropy"), tmp_path / "run")
    queries = backtrail.Parameter("0.bias", [0])
    with pytest.raises(WrongDerivative, match="The derivative of step 3 is wrong"):
        backtrail.DIT(curvature=backtrail.GaussNewton()).attribute(run, queries)


class Outside(nn.Module):
    """A scale, and a buffer, that leave torch on their way."""

    mean: Tensor

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """Scale by a Python number, or subtract a mean that NumPy computes."""
        if self.where == "item":
            return x * x.square().mean().item()
        if self.training:
            found = 0.9 * self.mean.detach().numpy() + 0.1 * x.detach().numpy().mean(0)
            self.mean.copy_(torch.from_numpy(found))
        return x - self.mean


@pytest.mark.parametrize("where", ["item", "NumPy"])
def test_what_leaves_torch_is_an_error(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No derivative passes through Python numbers and NumPy, so differences disagree."""
    monkeypatch.setitem(LAYERS, where, lambda: Outside(where))
    run = recorded(Training((where,), "cross-entropy"), tmp_path / "run")
    with pytest.raises(WrongDerivative):
        backtrail.DIT().attribute(run, backtrail.Parameter("0.bias", [0]))


def test_differences_need_a_symmetric_second_derivative(tmp_path: Path) -> None:
    """Products by differences are refused where the training stops gradients."""
    run = recorded(Training(("detach",), "cross-entropy"), tmp_path / "run")
    queries = backtrail.Parameter("0.bias", [0])
    method = backtrail.DIT(curvature=backtrail.Hessian(product="difference"))
    with pytest.raises(BadSetting, match=r"product='difference'.*detach"):
        method.attribute(run, queries)


def test_what_is_detached_for_a_log_changes_nothing(tmp_path: Path) -> None:
    """A stop-gradient that the loss does not depend on is no reason to refuse."""
    training = Training(("tanh",), "cross-entropy")
    folder = tmp_path / "run"
    seen: list[torch.Tensor] = []

    def loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append(outputs.detach() * 2)
        return training.row_losses(outputs, batch)

    model, optimizer = training.start()
    task = backtrail.Task(model, training.data, loss=loss)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        loader = DataLoader(training.data, batch_sampler=training.batches())
        training.run(model, optimizer, recorder.watch(loader))
    run = backtrail.open_run(folder, task)
    queries = backtrail.Parameter("0.bias", [0])
    exact = backtrail.DIT().attribute(run, queries)
    method = backtrail.DIT(curvature=backtrail.Hessian(product="difference"))
    by_differences = method.attribute(run, queries)
    assert exact.values() == pytest.approx(by_differences.values(), rel=1e-4, abs=1e-9)


def test_the_result_says_what_the_check_found(tmp_path: Path) -> None:
    """Segments have no second derivative in torch: products by differences, and it says so."""
    training = Training(("segments",), "cross-entropy")
    run = recorded(training, tmp_path / "run")
    result = backtrail.DIT().attribute(run, backtrail.Parameter("0.bias", [0]))
    assert "_segment_reduce_backward" in str(result.settings["differences"])
    found = str(result.settings["derivatives"])
    assert found.startswith("passed, by differences of gradients: torch has no second derivative")


def test_differences_in_the_place_of_a_missing_second_derivative_are_checked(
    tmp_path: Path,
) -> None:
    """Differences of gradients are wrong where the training stops gradients, too."""
    run = recorded(Training(("segments", "no_grad"), "cross-entropy"), tmp_path / "run")
    with pytest.raises(WrongDerivative, match=r"_segment_reduce_backward.*stops gradients"):
        backtrail.DIT().attribute(run, backtrail.Parameter("0.bias", [0]))


@pytest.mark.parametrize("layer", ["instance norm, running", "running mean", "queue"])
def test_differences_do_not_follow_buffers(layer: str, tmp_path: Path) -> None:
    """They are refused, whether they were asked for or are needed."""
    run = recorded(Training((layer,), "cross-entropy"), tmp_path / "run")
    queries = backtrail.Parameter("0.bias", [0])
    method = backtrail.DIT(curvature=backtrail.Hessian(product="difference"))
    with pytest.raises(BadSetting, match=r"product='difference'.*change 1\."):
        method.attribute(run, queries)
    run = recorded(Training((layer, "segments"), "cross-entropy"), tmp_path / "second")
    with pytest.raises(NoSecondDerivative, match=r"_segment_reduce_backward.*changes 1\."):
        backtrail.DIT().attribute(run, queries)


class FromStep(nn.Module):
    """Tanh in train mode, and another function from the step on at which it is in eval mode."""

    def __init__(self, later: str) -> None:
        super().__init__()
        self.later = LAYERS[later]()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function of the mode."""
        return torch.tanh(x) if self.training else self.later(x)


def recorded_with_a_late(layer: str, folder: Path) -> Run:
    """Record a training of 16 steps, the last two of which use a layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), FromStep(layer), nn.Linear(6, 3)).double()
    inputs = torch.randn(32, 4, dtype=torch.float64)
    data = TensorDataset(inputs, torch.randint(0, 3, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    task = backtrail.classification(model, data)
    with backtrail.Recorder(folder, task, optimizer, checkpoints=backtrail.Every(1)) as recorder:
        for epoch in range(4):
            for number, batch in enumerate(recorder.watch(DataLoader(data, batch_size=8))):
                if epoch == 3 and number == 2:
                    model[1].eval()
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return backtrail.open_run(folder, task)


def test_differences_need_a_symmetric_second_derivative_in_late_steps_too(tmp_path: Path) -> None:
    """A training that stops gradients in its last two steps only is found out."""
    run = recorded_with_a_late("detach", tmp_path / "run")
    queries = backtrail.Parameter("0.bias", [0])
    method = backtrail.DIT(curvature=backtrail.Hessian(product="difference"))
    with pytest.raises(BadSetting, match=r"product='difference'.*detach"):
        method.attribute(run, queries)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_second_derivative_that_only_late_steps_lack(tmp_path: Path) -> None:
    """The step is named, and so is what works: differences, which equal retraining."""
    run = recorded_with_a_late("segments", tmp_path / "run")
    queries = backtrail.Parameter("0.bias", [0])
    with pytest.raises(LateSecondDerivative, match=r"Step 15.*_segment_reduce_backward"):
        backtrail.DIT().attribute(run, queries)
    method = backtrail.DIT(curvature=backtrail.Hessian(product="difference"))
    found = method.attribute(run, queries)
    check = backtrail.trust(run, found, removals=4).derivative
    assert check is not None
    assert check.passed


def test_the_result_says_what_left_torch(tmp_path: Path) -> None:
    """A number that is only logged is no error; that it is held constant is said."""
    training = Training(("tanh",), "cross-entropy")
    logged: list[float] = []

    def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        logged.append(outputs.mean().item())
        return training.row_losses(outputs, batch)

    model, optimizer = training.start()
    task = backtrail.Task(model, training.data, loss=loss)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        loader = DataLoader(training.data, batch_sampler=training.batches())
        training.run(model, optimizer, recorder.watch(loader))
    run = backtrail.open_run(tmp_path / "run", task)
    result = backtrail.DIT().attribute(run, backtrail.Parameter("0.bias", [0]))
    assert "takes out of torch (item)" in str(result.settings["held"])
    assert result.settings["derivatives"] == "passed"


def test_the_result_says_that_another_curvature_stops_gradients(tmp_path: Path) -> None:
    """The Gauss-Newton matrix is that of the training's gradient."""
    run = recorded(Training(("detach",), "cross-entropy"), tmp_path / "run")
    queries = backtrail.Parameter("0.bias", [0])
    result = backtrail.DIT(curvature=backtrail.GaussNewton()).attribute(run, queries)
    assert "what it stops (detach)" in str(result.settings["surrogates"])
    assert "surrogates" not in backtrail.DIT().attribute(run, queries).settings
