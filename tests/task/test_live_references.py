"""No function of the task's copy of a model calls the live model."""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backtrail
from backtrail.errors import LiveParameter, UnexplainedGradient
from tests.loops import FEATURES, Loop, mlp, recorded_loop, refused, rows

Patch = Callable[[nn.Module], None]


def wrapped_closure(model: nn.Module) -> None:
    """`functools.wraps` around the bound forward of the live model."""
    old = model.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return old(*args, **kwargs).float()

    model.forward = forward


def wrapped_method(model: nn.Module) -> None:
    """A method around the class's function, as accelerate makes it."""
    old = type(model).forward

    def forward(self: nn.Module, *args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return old(self, *args).float()

    model.forward = types.MethodType(forward, model)


class AsFloat:
    """A callable object around another callable."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(*args).float()


def wrapped_object(model: nn.Module) -> None:
    """A callable object around the bound forward."""
    model.forward = AsFloat(model.forward)


def partial_of_module(model: nn.Module) -> None:
    """A partial that holds the live module and its old forward."""
    old = model.forward

    def forward(module: nn.Module, *args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module.old_forward(*args).float()  # type: ignore[operator]

    model.old_forward = old  # type: ignore[assignment]
    bound = functools.partial(forward, model)
    model.forward = functools.update_wrapper(bound, old)


@pytest.mark.parametrize(
    "patch", [wrapped_closure, wrapped_method, wrapped_object, partial_of_module]
)
def test_wrappers_of_forward_are_left_out(patch: Patch, tmp_path: Path) -> None:
    """A bfloat16 wrapper trains under autocast; influence equals that of autocast itself."""
    loop = Loop.of(mlp())
    patch(loop.model)
    run = recorded_loop(loop, tmp_path / "run")
    assert {step.autocast for step in run.log} == {"bfloat16"}
    assert "forward" not in vars(run.task.binding.model)
    plain = backtrail.open_run(tmp_path / "run", Loop.of(mlp()).task())
    query = backtrail.Loss(rows(5, 1), samples=[0])
    found = backtrail.DIT().attribute(run, query).total()
    expected = backtrail.DIT().attribute(plain, query).total()
    assert abs(expected).max() > 0
    assert (found == expected).all()
    outputs, _ = run.task.outputs(run.state(0).params, {}, run.task.batch([0, 1]))
    assert outputs.dtype == torch.float32


def test_accelerate(tmp_path: Path) -> None:
    """The wrapper that accelerate makes for mixed precision is left out."""
    accelerate = pytest.importorskip("accelerate")
    loop = Loop.of(mlp())
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
    task = backtrail.classification(model, loop.data)
    with backtrail.Recorder(tmp_path / "run", task, loop.optimizer) as recorder:
        for batch in recorder.watch(loop.loader()):
            accelerator.backward(cross_entropy(model(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()
    run = backtrail.open_run(tmp_path / "run", task)
    run.verify()
    assert "forward" not in vars(run.task.binding.model)
    assert {step.autocast for step in run.log} == {"bfloat16"}


def test_a_wrapper_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """The self-check finds it, and its sentence names the wrapper."""
    loop = Loop.of(mlp())
    old = loop.model.forward
    loop.model.forward = functools.wraps(old)(lambda *args: 2 * old(*args))
    with refused(UnexplainedGradient, "The forward of 'the model' was replaced", "subclass"):
        recorded_loop(loop, tmp_path / "run")


def own_method(model: nn.Module) -> None:
    """A forward that has nothing to do with the class's."""

    def forward(self: nn.Module, inputs: Tensor) -> Any:
        return self.get_submodule("2")(self.get_submodule("0")(inputs).sin())

    model.forward = types.MethodType(forward, model)


def own_closure(model: nn.Module) -> None:
    """The same as a function that refers to the live model's layers by its closure."""
    first = model.get_submodule("0")
    last = model.get_submodule("2")
    model.forward = lambda inputs: last(first(inputs).sin())


def own_holder(model: nn.Module) -> None:
    """The same as a method of an object that holds the model."""
    holder = types.SimpleNamespace(model=model)
    model.forward = lambda inputs: holder.model[2](holder.model[0](inputs).sin())


def with_a_hook(model: nn.Module) -> None:
    """A forward hook that calls another layer of the live model."""
    last = model.get_submodule("2")
    model.register_forward_hook(lambda *given: given[2] + last(given[2] @ last.weight))


@pytest.mark.parametrize("patch", [own_method, own_closure, own_holder, with_a_hook])
def test_other_functions_call_the_copy(patch: Patch, tmp_path: Path) -> None:
    """Outputs and gradients follow the weights that are given, not those of the live model."""
    loop = Loop.of(mlp().double(), data=doubled())
    patch(loop.model)
    run = recorded_loop(loop, tmp_path / "run")
    state = run.state(0)
    batch = run.task.batch([0, 1, 2])
    outputs, _ = run.task.outputs(state.params, {}, batch)
    fresh = mlp().double()
    patch(fresh)
    torch.testing.assert_close(outputs, fresh(batch[0]))
    assert not torch.allclose(outputs, loop.model(batch[0]))
    query = backtrail.Loss(doubled(), samples=[0])
    report = backtrail.trust(run, backtrail.DIT().attribute(run, query), removals=2)
    assert report.derivative is not None
    assert report.derivative.passed


def doubled() -> torch.utils.data.TensorDataset:
    """Rows in float64."""
    inputs, labels = rows().tensors
    return torch.utils.data.TensorDataset(inputs.double(), labels)


class WithALambda(nn.Module):
    """A module whose attribute is a lambda over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)
        self.twice = [lambda inputs: 2 * self.layer(inputs)]

    def forward(self, inputs: Any) -> Any:
        """Call it."""
        return self.twice[0](inputs)


def test_a_lambda_over_self() -> None:
    """It calls the layers of the copy."""
    model = WithALambda()
    task = backtrail.classification(model, rows())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in task.parameters().items()}
    outputs, _ = task.outputs(zeros, {}, task.batch([0, 1]))
    assert not outputs.any()


def test_a_parameter_of_the_live_model_is_refused() -> None:
    """A replay cannot give a closed-over parameter another value."""
    model = mlp()
    weight = model.get_parameter("2.weight")
    model[0].register_forward_hook(lambda *given: given[2] + weight.sum())
    with refused(LiveParameter, "_forward_hooks of module '0'", "'2.weight'"):
        _ = backtrail.classification(model, rows()).binding
