"""What cannot be recorded is refused, and the message says what, where and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.errors import (
    BadBatch,
    BadLoss,
    BadOptimizer,
    BadPolicy,
    BadReduction,
    BadSetting,
    ChangedOutside,
    Diverged,
    NoDerivative,
    OtherSlots,
    RunExists,
    SharedStorage,
    SparseGradient,
    StaleGradient,
    UnexplainedGradient,
    UnrepeatableRows,
    UnsupportedOptimizer,
    UnwatchedStep,
)
from tests.loops import CLASSES, Augmented, Loop, backward, mlp, refused, rows
from tests.processes import in_fresh_process


def record(loop: Loop, path: Path, **options: Any) -> None:
    """Record the loop of `Loop.train`."""
    with loop.recorder(path / "run", **options) as recorder:
        loop.train(recorder.watch, loop.loader(collate_fn=loop.options.get("collate")))


class MySGD(torch.optim.SGD):
    """A user's own optimizer."""


NEVER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LBFGS": torch.optim.LBFGS,
    "Rprop": torch.optim.Rprop,
    "SparseAdam": torch.optim.SparseAdam,
    "MySGD": MySGD,
}
LATER = {
    name: getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)
}


@pytest.mark.parametrize("name", [*NEVER, *LATER])
def test_optimizers_without_a_derivative(name: str, tmp_path: Path) -> None:
    """An optimizer that is not supported is named, with those that are."""
    layer = nn.Linear(3, 3, bias=False)
    optimizer = (NEVER | LATER)[name](layer.parameters())
    with refused(UnsupportedOptimizer, name, "Supported: SGD, Adam"):
        backtrail.Recorder(tmp_path / "run", backtrail.classification(layer, rows()), optimizer)


def test_the_optimizer_of_another_model(tmp_path: Path) -> None:
    """An optimizer of another model's parameters is refused, with their shapes."""
    loop = Loop(mlp(), Loop.of(mlp()).optimizer)
    with refused(
        BadOptimizer, "4 tensors that are not the task model's", "(8, 3)", "pass the model"
    ):
        record(loop, tmp_path)


def test_several_optimizers(tmp_path: Path) -> None:
    """A list of optimizers is refused."""
    with refused(BadOptimizer, "got a list", "one torch.optim optimizer"):
        in_fresh_process(with_two_optimizers, tmp_path)


def with_two_optimizers(path: Path) -> None:
    """Record with a list of optimizers, which the shape checks would refuse first."""
    loop = Loop.of(mlp())
    loop.optimizer = [loop.optimizer, loop.optimizer]  # type: ignore[assignment]
    record(loop, path)


def test_only_embeddings_are_captured(tmp_path: Path) -> None:
    """Methods other than DataValueEmbedding cannot be captured."""
    with refused(BadSetting, "capture=TracIn", "a backtrail.DataValueEmbedding"):
        in_fresh_process(with_another_method, tmp_path)


def with_another_method(path: Path) -> None:
    """Record with a capture for TracIn."""
    Loop.of(mlp()).recorder(path, capture=backtrail.TracIn())


def test_a_second_optimizer_moves_a_parameter(tmp_path: Path) -> None:
    """A change by a second optimizer is found, with the parameter and the steps."""
    loop = Loop.of(mlp())
    other = torch.optim.SGD(loop.model[2].parameters(), lr=0.1)
    with (
        refused(ChangedOutside, "'2.weight'", "between steps 0 and 1", "one optimizer"),
        loop.recorder(tmp_path) as recorder,
    ):
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.optimizer.step()
            other.step()
            loop.optimizer.zero_grad()


def test_weights_loaded_between_steps(tmp_path: Path) -> None:
    """Loading a state_dict between steps is found."""
    loop = Loop.of(mlp())
    with (
        refused(ChangedOutside, "'0.weight'", "load_state_dict"),
        loop.recorder(tmp_path) as recorder,
    ):
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.step()
            loop.model.load_state_dict(loop.model.state_dict())


def test_groups_that_change(tmp_path: Path) -> None:
    """A parameter group that is added later is refused."""
    model = mlp()
    loop = Loop(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    with (
        refused(BadOptimizer, "parameter groups changed before step 1"),
        loop.recorder(tmp_path) as recorder,
    ):
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.optimizer.step()
            model.zero_grad()
            loop.optimizer.add_param_group({"params": model[2].parameters()})


def test_a_step_without_a_watched_batch(tmp_path: Path) -> None:
    """A loop over the loader itself is refused, and pointed to `watch`."""
    loop = Loop.of(mlp())
    with (
        refused(UnwatchedStep, "Step 0 has no batch", "recorder.watch(loader)"),
        loop.recorder(tmp_path),
    ):
        loop.train(lambda loader: loader)


def test_a_batch_fed_before_any_was_yielded(tmp_path: Path) -> None:
    """`recorder.fed` is refused before the first batch."""
    loop = Loop.of(mlp())
    with refused(UnwatchedStep, "Step 0"), loop.recorder(tmp_path) as recorder:
        recorder.fed(loop.data[:4])


def test_another_number_of_rows_is_fed(tmp_path: Path) -> None:
    """`recorder.fed` is refused for another number of rows than the batch had."""
    loop = Loop.of(mlp())
    with (
        refused(OtherSlots, "3 rows for a batch of 4 samples"),
        loop.recorder(tmp_path) as recorder,
    ):
        next(iter(recorder.watch(loop.loader())))
        recorder.fed(loop.data[:3])


def test_a_closure(tmp_path: Path) -> None:
    """A step with a closure is refused."""
    loop = Loop.of(mlp())
    with refused(BadOptimizer, "step(closure)", "without one"), loop.recorder(tmp_path) as recorder:
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.optimizer.step(lambda: 0.0)


def test_no_closure_given_by_position(tmp_path: Path) -> None:
    """`step(None)`, as wrappers of an optimizer call it, is an ordinary step."""
    loop = Loop.of(mlp())
    with loop.recorder(tmp_path / "run") as recorder:
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.optimizer.step(None)
            loop.optimizer.zero_grad()
    assert backtrail.open_run(tmp_path / "run", loop.task()).verify().steps == len(loop.loader())


def test_gradients_never_cleared(tmp_path: Path) -> None:
    """A step whose gradient holds that of the step before is refused."""
    loop = Loop.of(mlp())
    with refused(StaleGradient, "Step 1", "zero_grad()"), loop.recorder(tmp_path) as recorder:
        for batch in recorder.watch(loop.loader()):
            loop.backward(batch)
            loop.optimizer.step()


def test_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    """A NaN in the gradient is refused, and the steps before are in the run."""
    loop = Loop.of(mlp())
    with (
        refused(Diverged, "gradient of step 3", "nan", "complete up to step 2"),
        loop.recorder(tmp_path) as recorder,
    ):
        for number, batch in enumerate(recorder.watch(loop.loader())):
            backward(
                cross_entropy(loop.model(batch[0]), batch[1]) * (float("nan") if number == 3 else 1)
            )
            loop.step()
    assert backtrail.open_run(tmp_path, loop.task()).steps == 3


def summed(loop: Loop, batch: Any) -> None:
    """Take the sum of losses where the task takes the mean."""
    backward(cross_entropy(loop.model(batch[0]), batch[1], reduction="sum"))


def clipped(loop: Loop, batch: Any) -> None:
    """Clip, which the task does not say."""
    loop.backward(batch)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)


def penalized(loop: Loop, batch: Any) -> None:
    """Add a penalty, which the task does not say."""
    loop.backward(batch)
    backward(sum(p.square().sum() for p in loop.model.parameters()))


def mixed(loop: Loop, batch: Any) -> None:
    """Change the batch without telling the recorder."""
    loop.backward((batch[0].flip(0), batch[1]))


@pytest.mark.parametrize("pull", [summed, clipped, penalized, mixed])
@pytest.mark.parametrize("cause", ["reduce", "clip", "penalty", "fed(batch)"])
def test_a_loop_that_does_something_else(
    pull: Callable[[Loop, Any], None], cause: str, tmp_path: Path
) -> None:
    """A gradient that the task does not explain is refused, with the usual causes."""
    loop = Loop.of(mlp())
    with refused(UnexplainedGradient, "Step 0", "norm", cause), loop.recorder(tmp_path) as recorder:
        for batch in recorder.watch(loop.loader()):
            pull(loop, batch)
            loop.step()


def test_random_rows_that_are_not_stored(tmp_path: Path) -> None:
    """Rows that read differently every time are refused, with `keep_batches=True` as the remedy."""
    loop = Loop.of(mlp(), data=Augmented(lambda: float(torch.randn(()))))
    with refused(UnrepeatableRows, "Step 0: rows", "keep_batches=True"):
        record(loop, tmp_path)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda outputs, batch: cross_entropy(outputs, batch[1]), "returned ()"),
        (lambda outputs, _: outputs, "returned (4, 3)"),
        (lambda outputs, _: outputs.flatten(), "12 values for the 4 rows"),
        (lambda *_: 3.0, "returned float"),
    ],
)
def test_losses_that_are_not_one_value_per_slot(
    loss: Callable[[Any, Any], Any], got: str, tmp_path: Path
) -> None:
    """A loss that is not one number a slot is refused, with its shape."""
    loop = Loop.of(mlp())
    task = backtrail.Task(loop.model, loop.data, loss)
    with (
        refused(BadLoss, got, "reduction='none'"),
        backtrail.Recorder(tmp_path, task, loop.optimizer) as recorder,
    ):
        loop.train(recorder.watch)


def test_a_reduction_of_another_length(tmp_path: Path) -> None:
    """A reduction that returns another number of factors is refused, with both numbers."""
    loop = Loop.of(mlp(), options={"reduce": lambda _: torch.ones(3)})
    with refused(BadReduction, "4 slots", "[3]"):
        record(loop, tmp_path)


def test_a_folder_with_a_run(tmp_path: Path) -> None:
    """A folder that holds a run is refused."""
    record(Loop.of(mlp()), tmp_path)
    with refused(RunExists, str(tmp_path / "run"), "another folder"):
        record(Loop.of(mlp()), tmp_path)


def test_two_parameters_on_one_storage(tmp_path: Path) -> None:
    """Two parameters that share memory are refused by name."""
    model = mlp()
    model.append(nn.Linear(CLASSES, CLASSES))
    model.append(nn.Linear(CLASSES, CLASSES))
    model[4].weight = nn.Parameter(model.get_parameter("3.weight").detach())
    with refused(SharedStorage, "'3.weight' and '4.weight'", "module.weight = other.weight"):
        record(Loop.of(model), tmp_path)


class Bag(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(22, CLASSES, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the rows of the table."""
        found: Tensor = self.table(inputs[:, 0].abs().long())
        return found


def test_sparse_gradients(tmp_path: Path) -> None:
    """A sparse gradient is refused, with `sparse=False` as the remedy."""
    loop = Loop.of(Bag(), lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with refused(SparseGradient, "Step 0", "'table.weight'", "sparse=False"):
        record(loop, tmp_path)


class Box:
    """Something that is not a tensor."""


def boxed(items: list[Any]) -> Any:
    """Collate a batch with a `Box` in it."""
    return [*torch.utils.data.default_collate(items), Box()]


def test_batches_that_cannot_be_stored(tmp_path: Path) -> None:
    """A value that cannot be stored is refused by its type."""
    with refused(BadBatch, "contains a Box", "collate function"):
        record(Loop.of(mlp(), options={"collate": boxed}), tmp_path, keep_batches=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: backtrail.Every(0),
        lambda: backtrail.Epochs(0),
        lambda: backtrail.Geometric(1.0),
        lambda: backtrail.Last(0),
    ],
)
def test_policies_that_keep_nothing(make: Callable[[], object]) -> None:
    """Checkpoint policies with a period or window of zero are refused when they are made."""
    with refused(BadPolicy, "is not a valid checkpoint policy", "must be >= 1"):
        make()


class Bounded(nn.Linear):
    """Fails for weights that training does not reach, and has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to weights that are multiples of 1/8."""
        if not torch.equal(self.weight * 8, (self.weight * 8).round()):
            raise ValueError("the weights are not on the grid")
        return Once.apply(super().forward(x))


class Once(Function):
    """The identity, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a copy that NumPy makes, so nothing follows it."""
        del ctx
        return torch.from_numpy(x.detach().numpy().copy())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        """Return the cotangent."""
        del ctx
        return cotangent * 1


def test_a_gradient_without_a_derivative(tmp_path: Path) -> None:
    """Neither autograd nor differences can differentiate it: said at step 0, not at the end."""
    layer = Bounded(3, CLASSES, bias=False)
    with torch.no_grad():
        layer.weight.copy_((layer.weight * 8).round() / 8)
    loop = Loop.of(layer)
    with pytest.raises(NoDerivative, match="not on the grid"):
        record(loop, tmp_path)


def test_values_that_leave_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The recording warns of a number that the forward pass takes out of torch, once."""
    layer = nn.Linear(3, CLASSES)
    scales: list[float] = []

    def predict(model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch[0])
        scales.append(outputs.mean().item())
        return outputs

    record(Loop.of(layer, options={"predict": predict}), tmp_path)
    warnings = [entry.message for entry in caplog.records if "out of torch" in entry.message]
    assert len(warnings) == 1
    assert "(item)" in warnings[0]
