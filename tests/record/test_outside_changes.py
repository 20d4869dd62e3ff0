"""Changes by something other than the recorded optimizer are found while it is recorded."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import backtrail
from backtrail.errors import (
    ChangedOptimizerState,
    ChangedOutside,
    NotEntered,
    OtherOptimizer,
    ReplayMismatch,
)
from backtrail.record.outside_changes import OutsideChanges
from tests.loops import Loop, mlp, recorded_loop, refused

Change = Callable[[torch.optim.Optimizer], object]


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make an SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def zero(optimizer: torch.optim.Optimizer) -> None:
    """Reset the momentum."""
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()


def zero_data(optimizer: torch.optim.Optimizer) -> None:
    """Reset the momentum in a way that torch does not count as a write."""
    for state in optimizer.state.values():
        state["momentum_buffer"].data.zero_()


def halve(optimizer: torch.optim.Optimizer) -> None:
    """Load a state with half of the momentum of one parameter."""
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["state"][2]["momentum_buffer"] *= 0.5
    optimizer.load_state_dict(loaded)


def reload(optimizer: torch.optim.Optimizer) -> None:
    """Load the state that the optimizer has already."""
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def train(loop: Loop, recorder: backtrail.Recorder, change: Change) -> None:
    """Train for two epochs, with a change between them."""
    for epoch in range(2):
        if epoch:
            change(loop.optimizer)
        loop.train(recorder.watch, epochs=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (zero, "'momentum_buffer' of parameter '0.weight' has other values"),
        (zero_data, "'momentum_buffer' of parameter '0.weight' has other values"),
        (halve, "'momentum_buffer' of parameter '2.weight' has other values"),
        (lambda optimizer: optimizer.state.clear(), "'momentum_buffer' of parameter"),
    ],
    ids=["zero", "data.zero", "load_state_dict", "clear"],
)
def test_a_changed_optimizer_state(change: Change, named: str, tmp_path: Path) -> None:
    """A reset of the momentum is refused at the next step, whichever way it was done."""
    loop = Loop.of(mlp(), momentum)
    with (
        refused(ChangedOptimizerState, "between steps 5 and 6", named, "another Recorder"),
        loop.recorder(tmp_path / "run", checkpoints=backtrail.Epochs(1)) as recorder,
    ):
        train(loop, recorder, change)


def test_the_same_state_loaded_again_is_no_change(tmp_path: Path) -> None:
    """Copies of the optimizer's own tensors lead to the same training."""
    loop = Loop.of(mlp(), momentum)
    with loop.recorder(tmp_path / "run") as recorder:
        train(loop, recorder, reload)
    assert backtrail.open_run(tmp_path / "run", loop.task()).verify().difference == 0.0


def test_verify_compares_the_optimizer_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset at a stored state, which no gradient shows, is found by `verify`."""
    nothing: list[str] = []
    monkeypatch.setattr(OutsideChanges, "changed_moments", lambda *_: nothing)
    loop = Loop.of(mlp(), momentum)
    with loop.recorder(tmp_path / "run", checkpoints=backtrail.Epochs(1)) as recorder:
        train(loop, recorder, zero)
    with refused(ReplayMismatch, "Step 5", "'momentum_buffer'"):
        backtrail.open_run(tmp_path / "run", loop.task()).verify()


def test_parameters_written_through_data(tmp_path: Path) -> None:
    """Such a write is not counted by torch, and is found all the same."""
    loop = Loop.of(mlp())
    with (
        refused(ChangedOutside, "'2.bias'", "between steps 0 and 1"),
        loop.recorder(tmp_path / "run") as recorder,
    ):
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.step()
            loop.model.get_parameter("2.bias").data.clamp_(-0.01, 0.01)


def test_weights_that_are_swapped_in_and_out(tmp_path: Path) -> None:
    """An evaluation on averaged weights leaves no trace, also where it watches a loader."""
    loop = Loop.of(mlp(), momentum)
    averages = [parameter.detach().clone().mul(0.9) for parameter in loop.model.parameters()]

    def swap() -> None:
        for parameter, average in zip(loop.model.parameters(), averages, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    with loop.recorder(tmp_path / "run") as recorder:
        for _ in range(2):
            loop.train(recorder.watch, epochs=1)
            swap()
            for batch in recorder.watch(loop.loader()):
                loop.model(batch[0])
            swap()
    assert backtrail.open_run(tmp_path / "run", loop.task()).verify().difference == 0.0


def test_the_optimizer_of_another_phase(tmp_path: Path) -> None:
    """A new optimizer for a second phase is found at the next batch, not at the end."""
    loop = Loop.of(mlp())
    batches = 0
    with (
        refused(OtherOptimizer, "recorded Adam made no step since step 5", "another Recorder"),
        loop.recorder(tmp_path / "run") as recorder,
    ):
        for epoch in range(2):
            if epoch:
                loop.optimizer = momentum(loop.model)
            for batch in recorder.watch(loop.loader()):
                batches += 1
                loop.backward(batch)
                loop.step()
    assert batches == 7


def test_a_phase_on_other_parameters(tmp_path: Path) -> None:
    """The same where no gradient reaches the parameters of the first phase any more."""
    model = mlp()
    loop = Loop(model, torch.optim.Adam(model[2].parameters()))
    with (
        refused(OtherOptimizer, "'0.weight'", "no step since step 5"),
        loop.recorder(tmp_path / "run") as recorder,
    ):
        loop.train(recorder.watch, epochs=1)
        model[2].requires_grad_(False)
        loop.optimizer = torch.optim.Adam(model[0].parameters())
        loop.train(recorder.watch, epochs=1)


@pytest.mark.parametrize("batches", [1, 9])
def test_the_wrong_optimizer_from_the_start(batches: int, tmp_path: Path) -> None:
    """Found at the second batch, or at the end where there is none."""
    loop = Loop.of(mlp())
    recorder = loop.recorder(tmp_path / "run")
    loop.optimizer = momentum(loop.model)
    with refused(OtherOptimizer, "recorded Adam made no step yet", "whose step()"), recorder:
        for _, batch in zip(range(batches), recorder.watch(loop.loader()), strict=False):
            loop.backward(batch)
            loop.step()


def test_a_loop_outside_of_the_block(tmp_path: Path) -> None:
    """Without `with`, nothing would be recorded."""
    loop = Loop.of(mlp())
    with refused(NotEntered, "with backtrail.Recorder"):
        loop.train(loop.recorder(tmp_path / "run").watch)


def test_a_recorded_training_in_two_phases(tmp_path: Path) -> None:
    """What the errors advise: a run for each phase."""
    loop = Loop.of(mlp())
    recorded_loop(loop, tmp_path / "first", lambda watch: loop.train(watch, epochs=1))
    loop.optimizer = momentum(loop.model)
    recorded_loop(loop, tmp_path / "second", lambda watch: loop.train(watch, epochs=1))
