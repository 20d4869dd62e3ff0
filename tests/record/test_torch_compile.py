"""Compiled models are recorded and attributed like plain ones.

In processes of their own: the shape checks replace functions, and `torch.compile` cannot trace
into these.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import backtrail
from backtrail.run.run import Run
from backtrail.task import torch_compile
from tests.loops import Loop, backward, mlp, rows, stochastic_mlp
from tests.processes import in_fresh_process

Parts = tuple[Callable[..., Any], nn.Module]  # what the loop calls, and what the task is given
Make = Callable[[], nn.Sequential]
Way = Callable[[nn.Sequential, str], Parts]


def given_compiled(model: nn.Sequential, backend: str) -> Parts:
    """Compile the task's model, as one graph that the recorder's hooks must not break."""
    wrapped: Any = torch.compile(model, backend=backend, fullgraph=True)
    return wrapped, wrapped


def called_compiled(model: nn.Sequential, backend: str) -> Parts:
    """Call a compiled model in the loop, and give the plain one to the task."""
    return torch.compile(model, backend=backend), model


def partly(model: nn.Sequential, backend: str) -> Parts:
    """Compile one layer of the model."""
    layer: Any = torch.compile(model[0], backend=backend)
    model[0] = layer
    return model, model


def in_place(model: nn.Sequential, backend: str) -> Parts:
    """Compile by `model.compile()`, which makes no wrapper."""
    model.compile(backend=backend)
    return model, model


def by_method(model: nn.Sequential, backend: str) -> Parts:
    """Compile the forward method alone."""
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model, model


def untouched(model: nn.Sequential, backend: str) -> Parts:
    """Compile nothing."""
    del backend
    return model, model


WAYS = [given_compiled, called_compiled, partly, in_place, by_method]


def in_double(count: int, seed: int = 0) -> TensorDataset:
    """Draw rows in float64, so that rounding does not hide differences."""
    inputs, labels = rows(count, seed).tensors
    return TensorDataset(inputs.double(), labels)


def recorded(make: Make, way: Way, at: tuple[str, Path]) -> Run:
    """Record a training with a compiled model, and open it with a plain one."""
    torch.manual_seed(3)
    backend, path = at
    call, told = way(make().double(), backend)
    loop = Loop(told, torch.optim.AdamW(told.parameters(), lr=0.01), data=in_double(24))
    with loop.recorder(path) as recorder:
        for _ in range(2):
            for inputs, labels in recorder.watch(loop.loader(shuffle=False)):
                backward(cross_entropy(call(inputs), labels))
                loop.step()
    return backtrail.open_run(path, backtrail.classification(make().double(), loop.data))


def compare(make: Callable[[], nn.Sequential], way: Way, at: tuple[str, Path]) -> None:
    """Assert that log and influence are those of a plain training."""
    plain, found = (
        recorded(make, w, (at[0], at[1] / name))
        for name, w in (("plain", untouched), ("found", way))
    )
    assert found.manifest.params == plain.manifest.params
    assert found.manifest.buffers == plain.manifest.buffers
    assert [step.evaluating for step in found.log] == [step.evaluating for step in plain.log]
    assert [bool(step.fed[0].random) for step in found.log] == [
        bool(step.fed[0].random) for step in plain.log
    ]
    assert found.verify().difference < 1e-9
    query = backtrail.Loss(in_double(5, seed=1), aggregate="mean")
    ours, theirs = (
        backtrail.DIT().attribute(run, query, observed_at="epochs").values()
        for run in (found, plain)
    )
    scale = np.abs(theirs).max()
    assert scale > 0
    assert np.abs(ours - theirs).max() <= 1e-9 * scale


def test_names_have_no_trace_of_wrappers() -> None:
    """Names and modules of a compiled model are those of the plain one."""
    model = mlp()
    layer: Any = torch.compile(model[0], backend="eager")
    model[0] = layer
    whole = torch.compile(model, backend="eager")
    assert isinstance(whole, nn.Module)
    assert list(torch_compile.parameters(whole)) == list(dict(mlp().named_parameters()))
    assert list(torch_compile.modules(whole)) == list(dict(mlp().named_modules()))
    task = backtrail.classification(whole, rows())
    assert task.model is model
    assert [type(module) for module in task.binding.model.modules()] == [
        type(module) for module in mlp().modules()
    ]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_recorded_and_attributed_alike(
    backend: str, way: Way, tmp_path: Path
) -> None:
    """Every way to compile gives the log and influence of a plain model."""
    in_fresh_process(compare, stochastic_mlp, way, (backend, tmp_path))


def autocasts(path: Path) -> list[str]:
    """Record a compiled model with every second step under autocast; return the log's column."""
    model = mlp()
    call: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    loop = Loop.of(model, data=rows(16))
    with loop.recorder(path) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(loop.loader(shuffle=False))):
            with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
                loss = cross_entropy(call(inputs), labels)
            backward(loss)
            loop.step()
    run = backtrail.open_run(path, loop.task())
    assert run.verify().difference < 1e-6
    return [step.autocast for step in run.log]


def test_autocast_around_a_compiled_model_is_noticed(tmp_path: Path) -> None:
    """Autocast is recorded by hooks that are part of the compiled graph."""
    assert in_fresh_process(autocasts, tmp_path / "run") == ["bfloat16", "", "bfloat16", ""]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.__name__)
def test_generated_code_is_recorded_and_attributed_alike(way: Way, tmp_path: Path) -> None:
    """Inductor's code gives the same without dropout, whose masks it draws otherwise."""
    in_fresh_process(compare, mlp, way, ("inductor", tmp_path))
