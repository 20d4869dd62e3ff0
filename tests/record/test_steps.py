"""The batches of a step, for every shape of loop."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.errors import UnexplainedGradient
from tests.loops import (
    ORDER,
    Loop,
    backward,
    mlp,
    recorded_loop,
    rows,
    sample_numbers,
    sequential_batches,
    stochastic_mlp,
)

Watch = Callable[[Any], Any]


def halves(batches: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the factors of a loop that always divides by two accumulated batches."""
    return torch.cat([torch.full((len(labels),), 1 / (2 * len(labels))) for _, labels in batches])


def squares_of_labelled(outputs: Tensor, batch: Any) -> Tensor:
    """Losses of rows, zero where the label is."""
    return outputs.square().sum(1) * (batch[1] > 0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["zero_grad before", "zero_grad after"])
def test_accumulated_batches_form_one_step(
    tmp_path: Path, *, set_to_none: bool, first: bool
) -> None:
    """Two batches form a step, however the gradients are cleared; the last has one."""
    loop = Loop.of(stochastic_mlp(), data=rows(19), options={"reduce": halves})
    loader = loop.loader(**ORDER)

    def train(watch: Watch) -> None:
        for _ in range(3):
            for number, batch in enumerate(watch(loader), 1):
                if first and number % 2:
                    loop.optimizer.zero_grad(set_to_none=set_to_none)
                backward(cross_entropy(loop.model(batch[0]), batch[1]) / 2)
                if number % 2 == 0 or number == len(loader):
                    loop.optimizer.step()
                    if not first:
                        loop.optimizer.zero_grad(set_to_none=set_to_none)

    run = recorded_loop(loop, tmp_path / "run", train)
    one, two, three, four, five = sequential_batches(19, 4)
    assert sample_numbers(run) == [[one, two], [three, four], [five]] * 3
    assert run.epochs == (3, 6, 9)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_micro_batch_without_a_loss_counts_in_the_mean(
    tmp_path: Path, *, set_to_none: bool
) -> None:
    """Its gradient is zero, and nobody has cleared it."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    data: Any = TensorDataset(torch.randn(16, 5), labels)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = backtrail.Task(model, data, loss=squares_of_labelled)
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for number, batch in enumerate(recorder.watch(DataLoader(data, batch_size=4))):
            backward(squares_of_labelled(model(batch[0]), batch).mean() / 2)
            if number % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    run = backtrail.open_run(tmp_path / "run", task)
    one, two, three, four = sequential_batches(16, 4)
    assert sample_numbers(run) == [[one, two], [three, four]]
    run.verify()


def test_epochs_that_end_within_a_step_keep_their_states(tmp_path: Path) -> None:
    """`Epochs` stores the state after a step whose last batch begins a new epoch."""
    loop = Loop.of(mlp(), data=rows(12))
    loader = loop.loader(**ORDER)
    waiting = 0

    def train(watch: Watch) -> None:
        nonlocal waiting
        for _ in range(4):
            for batch in watch(loader):
                backward(cross_entropy(loop.model(batch[0]), batch[1]) / 2)
                waiting += 1
                if waiting % 2 == 0:
                    loop.step()

    run = recorded_loop(loop, tmp_path / "run", train, checkpoints=backtrail.Epochs())
    assert [[fed.epoch for fed in step.fed] for step in run.log] == [
        [0, 0],
        [0, 1],
        [1, 1],
        [2, 2],
        [2, 3],
        [3, 3],
    ]
    assert set(run.epochs) <= set(run.kept)


def test_validation_in_between_is_not_a_step(tmp_path: Path) -> None:
    """Validation, with gradients or without and over any loader, is not recorded."""
    loop = Loop.of(stochastic_mlp())
    loader = loop.loader(**ORDER)
    other = DataLoader(rows(9, seed=4), batch_size=3, shuffle=True)

    def validate(batches: Iterable[Any]) -> None:
        loop.model.eval()
        with torch.no_grad():
            for batch in batches:
                loop.model(batch[0])
        batch = next(iter(other))
        loss = cross_entropy(loop.model(batch[0]), batch[1])
        torch.autograd.grad(loss, list(loop.model.parameters()), retain_graph=True)
        backward(loss)
        loop.optimizer.zero_grad()
        loop.model.train()

    def train(watch: Watch) -> None:
        for _ in range(2):
            for number, batch in enumerate(watch(loader)):
                loop.backward(batch)
                loop.step()
                if number % 2:
                    validate(other)
            validate(loader)
            validate(watch(loader))

    run = recorded_loop(loop, tmp_path / "run", train)
    assert sample_numbers(run) == [[batch] for batch in sequential_batches(22, 4)] * 2
    assert [step.evaluating for step in run.log] == [()] * run.steps


def test_a_loop_that_draws_before_its_forward_pass_says_so(tmp_path: Path) -> None:
    """Random numbers drawn between loader and dropout are refused, and `fed` is the remedy."""

    def train(loop: Loop, recorder: backtrail.Recorder, *, cured: bool) -> None:
        with recorder:
            for batch in recorder.watch(loop.loader()):
                torch.randn(3)
                if cured:
                    recorder.fed(batch)
                loop.backward(batch)
                loop.step()

    loop = Loop.of(stochastic_mlp())
    with pytest.raises(UnexplainedGradient, match=r"random numbers drawn .*recorder\.fed"):
        train(loop, loop.recorder(tmp_path / "run"), cured=False)
    loop = Loop.of(stochastic_mlp())
    train(loop, loop.recorder(tmp_path / "cured"), cured=True)
    assert backtrail.open_run(tmp_path / "cured", loop.task()).verify().difference < 1e-5


def test_several_losses_on_one_batch_are_one_feeding(tmp_path: Path) -> None:
    """Two backward passes on one batch make a step with that batch once."""

    def twice(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), model(2 * batch[0])

    def loss(outputs: Any, batch: Any) -> Tensor:
        return sum((cross_entropy(o, batch[1], reduction="none") for o in outputs), torch.zeros(()))

    loop = Loop.of(stochastic_mlp())

    def train(watch: Watch) -> None:
        for batch in watch(loop.loader(**ORDER)):
            first, second = twice(loop.model, batch)
            backward(cross_entropy(first, batch[1]))
            backward(cross_entropy(second, batch[1]))
            loop.step()

    task = backtrail.Task(loop.model, loop.data, loss, predict=twice)
    with backtrail.Recorder(
        tmp_path / "run", task, loop.optimizer, checkpoints=backtrail.Every(3)
    ) as recorder:
        train(recorder.watch)
    run = backtrail.open_run(tmp_path / "run", task)
    assert run.verify().difference < 1e-5
    assert sample_numbers(run) == [[batch] for batch in sequential_batches(22, 4)]


def test_two_steps_on_one_batch_are_two_steps(tmp_path: Path) -> None:
    """Two steps on one batch are replayed with two dropout masks."""
    loop = Loop.of(stochastic_mlp())

    def train(watch: Watch) -> None:
        for batch in watch(loop.loader(**ORDER)):
            for _ in range(2):
                loop.backward(batch)
                loop.step()

    run = recorded_loop(loop, tmp_path / "run", train, checkpoints=backtrail.Every(3))
    assert sample_numbers(run) == [[batch] for batch in sequential_batches(22, 4) for _ in range(2)]


def test_a_skipped_step_is_none(tmp_path: Path) -> None:
    """A batch whose gradient the loop drops belongs to no step."""
    loop = Loop.of(mlp(nn.Dropout(0.2)))

    def train(watch: Watch) -> None:
        for _ in range(2):
            for number, batch in enumerate(watch(loop.loader(**ORDER))):
                loop.backward(batch)
                if number in {0, 3}:
                    loop.optimizer.zero_grad()
                else:
                    loop.step()

    run = recorded_loop(loop, tmp_path / "run", train, checkpoints=backtrail.Epochs())
    kept = [batch for number, batch in enumerate(sequential_batches(22, 4)) if number not in {0, 3}]
    assert sample_numbers(run) == [[batch] for batch in kept] * 2
    assert run.kept == (0, 4, 8)


@pytest.mark.parametrize("fused", [False, True])
def test_a_real_gradient_scaler_skips_and_scales(tmp_path: Path, *, fused: bool) -> None:
    """Steps that overflow are not recorded; the others have the unscaled gradient."""
    loop = Loop.of(
        mlp(),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=fused),
        data=rows(40),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 * 1.9)
    weight = loop.model.get_parameter("0.weight")
    made = list[int]()

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader(**ORDER))):
            backward(scaler.scale(20 * cross_entropy(loop.model(batch[0]), batch[1])))
            before = weight.detach().clone()
            scale = scaler.get_scale()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
            if scaler.get_scale() == scale:
                made.append(number)
            assert torch.equal(weight, before) is (number not in made)

    loop.options["reduce"] = lambda _: torch.full((4,), 5.0)
    run = recorded_loop(loop, tmp_path / "run", train)
    assert sample_numbers(run) == [
        [batch] for number, batch in enumerate(sequential_batches(40, 4)) if number in made
    ]
    assert 0 < len(made) < 10


@pytest.mark.parametrize("backwards", [True, False], ids=["gradient thrown away", "no gradient"])
@pytest.mark.parametrize("skipped", [{0}, {2, 3}, {0, 5}], ids=str)
def test_a_skipped_step_still_moves_batch_norm(
    skipped: set[int], tmp_path: Path, *, backwards: bool
) -> None:
    """The replay updates BatchNorm's statistics by batches without a step, too."""
    loop = Loop.of(stochastic_mlp())

    def train(watch: Watch) -> None:
        for number, batch in enumerate(watch(loop.loader(**ORDER))):
            loss = cross_entropy(loop.model(batch[0]), batch[1])
            if number not in skipped or backwards:
                backward(loss)
            if number in skipped:
                loop.optimizer.zero_grad()
            else:
                loop.step()

    run = recorded_loop(loop, tmp_path / "run", train, checkpoints=backtrail.Every(50))
    made = [
        batch for number, batch in enumerate(sequential_batches(22, 4)) if number not in skipped
    ]
    assert [step.samples for step in run.log] == made
    assert backtrail.DIT().attribute(run, backtrail.Loss(loop.data)).slots == 4
