"""What users see: explicit parameters, documented names, one-line reprs, and refused mistakes."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import backtrail
from backtrail.stats import Interval

API = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = sorted(name for name in backtrail.__all__ if name not in {"__version__", "plot"})
DATA = TensorDataset(torch.zeros(9, 2), torch.zeros(9, dtype=torch.long))
WORDS = 5  # that a docstring must have more of


def members(name: str) -> dict[str, Callable[..., Any]]:
    """A public function, or a class with its public methods and properties, by their full names."""
    public = getattr(backtrail, name)
    if not inspect.isclass(public):
        return {name: public}
    # Abstract classes and protocols cannot be made, and exceptions take anything.
    is_interface = inspect.isabstract(public) or getattr(public, "_is_protocol", False)
    is_made = not (issubclass(public, Exception) or is_interface)
    found: dict[str, Callable[..., Any]] = {name: public} if is_made else {}
    for member, value in vars(public).items():
        function = value.fget if isinstance(value, property) else value
        function = getattr(function, "func", getattr(function, "__func__", function))
        if not member.startswith("_") and inspect.isfunction(function):
            found[f"{name}.{member}"] = function
    return found


CALLABLES = {
    full_name: function for name in NAMES for full_name, function in members(name).items()
} | {
    f"plot.{name}": function
    for name, function in vars(backtrail.plot).items()
    if inspect.isfunction(function)
    and not name.startswith("_")
    and function.__module__ == "backtrail.plot"
}


@pytest.mark.parametrize("name", CALLABLES)
def test_parameters_are_explicit(name: str) -> None:
    """No `*args`, no `**options`: an editor can complete them, and a typing error is one."""
    for parameter in inspect.signature(CALLABLES[name]).parameters.values():
        assert parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_mistyped_option_is_an_error(name: str) -> None:
    """Of every public function, method and class, with the option in the message."""
    function = CALLABLES[name]
    given: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is parameter.empty:
            given[parameter.name] = None
    with pytest.raises(TypeError, match="mistpyed"):
        function(**given, mistpyed=None)


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented(name: str) -> None:
    """Each has a docstring that says something, and an entry in docs/api.md."""
    text = inspect.getdoc(getattr(backtrail, name))
    assert text is not None
    assert len(text.split()) > WORDS
    assert re.search(rf"^\.\. auto\w+:: backtrail\.{name}$", API, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_abstract_or_final(name: str) -> None:
    """A class is derived from, or made; never both. Errors may be caught by any of their bases."""
    public = getattr(backtrail, name)
    if inspect.isclass(public) and not issubclass(public, Exception):
        is_protocol = getattr(public, "_is_protocol", False)
        is_final = getattr(public, "__final__", False)
        assert inspect.isabstract(public) or is_protocol or is_final


# Types of the engine that a few methods for experts return; they may change.
INTERNAL = {
    "About",
    "Description",
    "GradientJVP",
    "GradientVJP",
    "LiveCapture",
    "Manifest",
    "Point",
    "Projection",
    "Trajectory",
    "Transition",
    "_Binding",
}


@pytest.mark.parametrize("name", CALLABLES)
def test_types_of_results_are_public(name: str) -> None:
    """What a public function returns has a public name."""
    function = CALLABLES[name]
    if inspect.isclass(function):
        return
    written = str(inspect.signature(function).return_annotation)
    returned = set(re.findall(r"backtrail\.(?:\w+\.)+(\w+)", written))
    assert returned <= set(backtrail.__all__) | INTERNAL


def biggest(model: torch.nn.Module) -> torch.Tensor:
    """Two numbers of a model."""
    return torch.stack([parameter.max() for parameter in model.parameters()])


QUERIES = {
    "Loss": (
        lambda: backtrail.Loss(DATA, [3, 7], unit="nats"),
        "Loss(2 samples: 3, 7; aggregate=None)",
    ),
    "Logit": (
        lambda: backtrail.Logit(DATA, [3], target=1),
        "Logit(1 sample: 3; target=1, aggregate=None)",
    ),
    "Margin": (
        lambda: backtrail.Margin(DATA, aggregate="mean"),
        "Margin(9 samples: 0, 1, 2, ... (3 more) ..., 6, 7, 8; aggregate='mean')",
    ),
    "Feature": (
        lambda: backtrail.Feature(DATA, [3], layer="0", unit=2, mode="train"),
        "Feature(1 sample: 3; layer='0', unit=2, aggregate=None, mode='train')",
    ),
    "Saliency": (
        lambda: backtrail.Saliency(DATA, [3], inputs=[0, 1]),
        "Saliency(1 sample: 3; inputs=[0, 1], aggregate=None)",
    ),
    "Parameter": (
        lambda: backtrail.Parameter("0.weight", [(0, 3)]),
        "Parameter('0.weight', 1 entry: (0, 3))",
    ),
    "Custom": (
        lambda: backtrail.Custom(biggest, labels=["a", "b"]),
        "Custom(biggest, 2 labels: a, b)",
    ),
    "Averaged": (
        lambda: backtrail.Averaged(backtrail.Loss(DATA, [3]), decay=None),
        "Averaged(Loss(1 sample: 3; aggregate=None), decay=None, start=0, every=1, "
        "use_buffers=False)",
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_queries_are_classes(name: str) -> None:
    """`isinstance` holds, and `print` shows rows and options, never the data set."""
    make, shown = QUERIES[name]
    query = make()
    assert isinstance(query, getattr(backtrail, name))
    assert isinstance(query, backtrail.Query)
    assert repr(query) == str(query) == shown
    assert query.mode in {"eval", "train"}
    assert query.unit


ONE = Interval(0.9, 0.8, 1.0)
EFFECTS = np.zeros((2, 3))
LINEAR = torch.nn.Linear(2, 3)
TASK = backtrail.classification(LINEAR, DATA)
SHOWN: list[object] = [
    backtrail.DIT(curvature=backtrail.GaussNewton(), slope=backtrail.Secant()),
    backtrail.TracIn(),
    backtrail.GradientDot(),
    backtrail.DataValueEmbedding(),
    backtrail.DiffIn(),
    backtrail.Checkpoints(TASK, [(10, LINEAR.state_dict(), 0.1)], steps=10),
    backtrail.Hessian(),
    backtrail.EmpiricalFisher(),
    backtrail.Zero(),
    backtrail.Tangent(),
    backtrail.Every(4),
    backtrail.Epochs(),
    backtrail.Geometric(),
    backtrail.Only((2, 5)),
    backtrail.Last(3),
    backtrail.ClipNorm(1.0),
    backtrail.ClipValue(1.0),
    backtrail.TokenMean(),
    TASK,
    backtrail.State(TASK.parameters()),
    backtrail.Step(index=7, fed=(), settings=(), norm=0.5),
    backtrail.Part((0,), torch.ones(1, 1), lambda _model, batch: batch),
    backtrail.Verification(40, 2, 1e-7),
    backtrail.Retrained(np.zeros((2, 1, 3)), np.zeros((2, 1)), np.zeros((2, 1)), (40,)),
    backtrail.DerivativeCheck(1e-7, 1e-8, 3.0, 1e-5),
    backtrail.RemovalCheck((0, 1, 2), EFFECTS, EFFECTS, ONE, ONE, slope=1.0, noise=0.0),
    backtrail.Trust(
        backtrail.Verification(40, 2, 1e-7),
        None,
        backtrail.RemovalCheck((0, 1, 2), EFFECTS, EFFECTS, ONE, ONE, slope=1.0, noise=0.0),
        early=0.1,
    ),
    backtrail.Forgotten(2, 0.1, 0.2, (1e-3, 2e-4), None, None),
    ONE,
]


@pytest.mark.parametrize("value", SHOWN, ids=lambda value: type(value).__name__)
def test_reprs_are_one_short_line(value: object) -> None:
    """With the class's name, and without the tensors, arrays and models inside."""
    shown = repr(value)
    assert shown.startswith(f"{type(value).__name__}(")
    assert shown.endswith(")")
    assert "\n" not in shown
    assert "tensor(" not in shown
    assert "array(" not in shown
    assert len(shown) < 200


METHODS: list[backtrail.Method] = [
    backtrail.DIT(),
    backtrail.TracIn(),
    backtrail.GradientDot(),
    backtrail.DataValueEmbedding(),
    backtrail.DiffIn(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_have_one_protocol(method: backtrail.Method) -> None:
    """`attribute(run, queries, *, observed_at=..., out=...)`, so that one can stand for another."""
    assert isinstance(method, backtrail.Method)
    parameters = inspect.signature(method.attribute).parameters
    assert list(parameters) == ["run", "queries", "observed_at", "out"]
    for name in ("observed_at", "out"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is not inspect.Parameter.empty


MISTAKES = {
    "Loss(data, aggregate='maen')": "Did you mean 'mean'?",
    "Loss(data, mode='evaluation')": "Invalid mode='evaluation': expected 'eval' or 'train'.",
    "Loss(data, batch=0)": "Invalid batch=0: expected a positive integer or None.",
    "DIT(denominator='kep')": "Did you mean 'keep'?",
    "DIT(chunk=0)": "Invalid chunk=0: expected a positive integer or None.",
    "TracIn(states='evry')": "Did you mean 'every'?",
    "DiffIn(form='corected')": "Did you mean 'corrected'?",
    "DataValueEmbedding(fisher='treu')": "Did you mean 'true'?",
    "leave_one_out(run, queries, samples=[1], denominator='share')": "'keep' or 'renormalize'.",
    "leave_one_out(run, queries, samples=[1], dtpye=None)": "dtpye",
    "retrain(run, queries, [[1]], window=(0, 1))": "window",
    "evaluate(run, influence, removal=4)": "removal",
    "select_coreset(run, 0.3, method='randm')": "Did you mean 'random'?",
    "select_coreset(run, 0.3, method='random', sede=2)": "sede",
    "select_coreset(run, 0.3, method='random', queries=queries)": (
        "select_coreset(method='random') does not use it; it takes among, balanced, seed. "
        "Leave queries= out."
    ),
    "select_coreset(run, 0.3, method='loss', seed=1)": "it takes among, balanced.",
    "select_coreset(run, 0.3, method=influence, queries=queries)": "method=Influence",
    "select_coreset(run, 0.3, method='tracin', queries=queries, seed=1)": "Leave seed= out.",
    "find_mislabeled(run, method='mean_loss')": "Did you mean 'mean-loss'?",
    "find_mislabeled(run, method='loss', validation=data)": "it takes checkpoints, out.",
    "find_mislabeled(run, method='el2n', window=(0, 2))": "Leave window= out.",
    "forget(run, [1], method=backtrail.DiffIn(), replay=1)": "Leave replay= out.",
    "forget(run, [1], method=backtrail.DiffIn(), dtype=torch.float64)": "Leave dtype= out.",
    "trust(run, influence, removal=4)": "removal",
    "influence.top(query='los[0]')": "Did you mean 'loss[0]'?",
    "influence.visits(5, 3)": "Invalid step range (5, 3): expected 0 <= start <= stop <= 4",
}
PROGRAM = """
import sys, tempfile
from pathlib import Path
import torch
import backtrail

torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
task = backtrail.classification(model, data)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
path = Path(tempfile.mkdtemp()) / "run"
with backtrail.Recorder(path, task, optimizer) as recorder:
    for x, y in recorder.watch(torch.utils.data.DataLoader(data, batch_size=5)):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
run = backtrail.open_run(path, task)
queries = backtrail.Loss(data, [0])
influence = backtrail.DIT().attribute(run, queries)
for call in sys.argv[1:]:
    try:
        eval(call if call.startswith("influence") else f"backtrail.{call}")
        print("no error")
    except (backtrail.BacktrailError, TypeError) as error:
        print(error)
"""


def test_mistakes_are_told_with_what_is_right() -> None:
    """In a process of its own, without the tests' type checks, as users have it."""
    command = [sys.executable, "-c", PROGRAM, *MISTAKES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for (call, sentence), printed in zip(MISTAKES.items(), done.stdout.splitlines(), strict=True):
        assert sentence in printed, call


def test_a_misspelt_name_proposes_the_right_one() -> None:
    """As Python does for the names of ordinary modules."""
    done = subprocess.run(
        [sys.executable, "-c", "import backtrail; backtrail.Los"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Did you mean: 'Loss'?" in done.stderr
