"""What the run says of a step: settings, frozen and tied parameters, penalty, clipping."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.errors import UnexplainedGradient
from tests.loops import (
    CLASSES,
    FEATURES,
    Loop,
    adam,
    backward,
    mlp,
    recorded_loop,
    refused,
    stochastic_mlp,
)

Watch = Callable[[Any], Any]


def test_settings_of_every_group_are_those_of_the_update(tmp_path: Path) -> None:
    """Every step has the rate and momentum of both groups that its update used."""
    model = mlp()
    groups: list[dict[str, Any]] = [
        {"params": model[0].named_parameters()},
        {"params": model[2].named_parameters(), "weight_decay": 0.1},
    ]
    loop = Loop(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        loop.optimizer, max_lr=[0.1, 0.2], total_steps=12
    )
    used: list[list[tuple[float, float]]] = []

    def train(watch: Watch) -> None:
        for _ in range(2):
            for batch in watch(loop.loader()):
                loop.backward(batch)
                used.append(
                    [(group["lr"], group["momentum"]) for group in loop.optimizer.param_groups]
                )
                loop.step()
                schedule.step()

    run = recorded_loop(loop, tmp_path / "run", train)
    assert [[(s["lr"], s["momentum"]) for s in step.settings] for step in run.log] == used
    assert run.table()["lr"].to_list() == [[lr for lr, _ in step] for step in used]
    assert len({momentum for step in used for _, momentum in step}) > 5


def test_frozen_and_unused_parameters_stay(tmp_path: Path) -> None:
    """Every step names the parameters without a gradient, and these do not change."""
    model = mlp()
    model.add_module("extra", nn.Identity())
    model.extra.register_parameter("unused", nn.Parameter(torch.ones(2)))  # type: ignore[union-attr]
    model[0].requires_grad_(False)
    loop = Loop.of(model)

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader())):
            model[0].requires_grad_(number > 2)
            loop.backward(batch)
            loop.step()

    run = recorded_loop(loop, tmp_path / "run", train)
    frozen = ("0.weight", "0.bias", "extra.unused")
    assert [step.unused for step in run.log] == [frozen] * 3 + [frozen[2:]] * 3
    assert torch.equal(
        run.state(3, replay=True).params["0.weight"], mlp().get_parameter("0.weight")
    )


def test_everything_may_be_frozen_but_what_comes_later(tmp_path: Path) -> None:
    """A parameter that is frozen at first may later be the only one that learns."""
    model = mlp()
    model[0].requires_grad_(False)
    loop = Loop.of(model)

    def train(watch: Watch) -> None:
        loop.train(watch, epochs=1)
        model.requires_grad_(False)
        model[0].bias.requires_grad_(True)
        loop.train(watch, epochs=1)

    assert recorded_loop(loop, tmp_path / "run", train).steps == 12


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(5)
        self.inner, self.outer = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.outer.weight = self.inner.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Use the weight twice."""
        found: Tensor = self.outer(torch.tanh(self.inner(inputs)))
        return found


def test_tied_parameters_are_one(tmp_path: Path) -> None:
    """A tied weight is in the run once, under its first name."""
    run = recorded_loop(Loop.of(Tied()), tmp_path / "run")
    assert run.trained == ("inner.weight", "inner.bias", "outer.bias")


def square(params: dict[str, Tensor]) -> Tensor:
    """Return the penalty, 0.1 * sum of squares."""
    return 0.1 * sum((p.square().sum() for p in params.values()), torch.zeros(()))


def test_a_penalty_counts_once_a_step(tmp_path: Path) -> None:
    """A penalty that the loop adds once for two batches replays."""
    loop = Loop.of(mlp(), options={"penalty": square})

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader())):
            backward(cross_entropy(loop.model(batch[0]), batch[1]) / 2)
            if number % 2:
                backward(square(dict(loop.model.named_parameters())))
                loop.step()

    recorded_loop(loop, tmp_path / "run", train)


@pytest.mark.parametrize(
    "clip",
    [backtrail.ClipNorm(0.3), backtrail.ClipNorm(0.2, float("inf")), backtrail.ClipValue(0.05)],
    ids=str,
)
@pytest.mark.parametrize("unused", [False, True])
def test_clipping_is_part_of_the_update(
    clip: backtrail.ClipNorm | backtrail.ClipValue, tmp_path: Path, *, unused: bool
) -> None:
    """Clipping by norm and by value replays, also with a parameter without a gradient."""
    model = mlp()
    loop = Loop.of(model, options={"clip": clip})
    parameters = list(model.parameters())
    if unused:
        model[0].bias.requires_grad_(False)

    def train(watch: Watch) -> None:
        for batch in watch(loop.loader()):
            loop.backward(batch)
            match clip:
                case backtrail.ClipNorm():
                    nn.utils.clip_grad_norm_(parameters, clip.max_norm, clip.norm_type)
                case backtrail.ClipValue():
                    nn.utils.clip_grad_value_(parameters, clip.max_value)
            loop.step()

    recorded_loop(loop, tmp_path / "run", train)


@pytest.mark.parametrize(
    "kind",
    ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD"],
)
def test_every_supported_optimizer_replays(kind: str, tmp_path: Path) -> None:
    """All of torch's elementwise optimizers replay."""
    loop = Loop.of(
        stochastic_mlp(), lambda model: getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    )
    assert recorded_loop(loop, tmp_path / "run").manifest.optimizer == kind


def test_sums_and_own_reductions_replay(tmp_path: Path) -> None:
    """A summed loss, and one divided by a constant, replay."""
    loop = Loop.of(mlp(), options={"reduce": "sum"})
    other = Loop.of(
        mlp(),
        options={"reduce": lambda batches: torch.full((sum(len(b[1]) for b in batches),), 1 / 7)},
    )
    for number, (each, scale) in enumerate(((loop, 1.0), (other, 1 / 7))):

        def train(watch: Watch, each: Loop = each, scale: float = scale) -> None:
            for batch in watch(each.loader()):
                backward(cross_entropy(each.model(batch[0]), batch[1], reduction="sum") * scale)
                each.step()

        recorded_loop(each, tmp_path / str(number), train)


def test_weights_changed_after_the_last_step_are_not_the_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights changed before the recorder closes are not stored, and the log says so."""
    loop = Loop.of(stochastic_mlp(), adam)

    def train(watch: Watch) -> None:
        loop.train(watch)
        with torch.no_grad():
            loop.model.get_parameter("0.weight").zero_()

    run = recorded_loop(loop, tmp_path / "run", train)
    assert run.steps not in run.kept
    assert run.manifest.finished
    assert "'0.weight' changed after the last step" in caplog.text


@pytest.mark.parametrize("written", ["sum", "mean"])
def test_clipping_does_not_hide_the_reduction(written: str, tmp_path: Path) -> None:
    """Both gradients are clipped to the same norm, and the one before clipping tells them apart."""
    clip = backtrail.ClipNorm(0.05)
    loop = Loop.of(mlp(), options={"reduce": "sum", "clip": clip})
    with loop.recorder(tmp_path / "run") as recorder:
        expectation = (
            refused(UnexplainedGradient, "Step 0", "both before clipping", "Task(reduce=...)")
            if written == "mean"
            else nullcontext()
        )
        with expectation:
            for batch in recorder.watch(loop.loader()):
                backward(cross_entropy(loop.model(batch[0]), batch[1], reduction=written))
                nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
                loop.step()
