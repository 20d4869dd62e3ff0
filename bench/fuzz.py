"""Call every public function with wrong arguments, and count what happens.

Run as `python -m bench.fuzz 5000`. One argument of an otherwise right call is replaced by something
from a list: other types, NaN, infinite, negative, huge and empty values, other containers, numbers
of numpy and torch. An argument outside of its documented domain must give a `BacktrailError`, one
inside of it a result or a `BacktrailError`, and no call may hang.
"""

import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail import plot
from backtrail.influence.influence import Influence

SECONDS = 30
ROWS = 12
TRAINED = 10  # the last rows are never trained on
STEPS = 10
EPOCHS = (5, 10)
Valid = Callable[[Any], bool]

OUTCOMES = ("right", "BacktrailError", "keyword", "user's own", "raw", "nonsense", "hang")
BAD = ("raw", "nonsense", "hang")


def wrong_values() -> list[Any]:
    """Values that most arguments cannot take; some of them can."""
    return [
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        7,
        10**9,
        10**30,
        -(10**30),
        0.0,
        0.5,
        1.5,
        2.0,
        -0.5,
        1e300,
        float("nan"),
        float("inf"),
        float("-inf"),
        1j,
        "",
        "x",
        "end",
        "ends",
        "7",
        "\0",
        "y" * 5000,
        b"x",
        [],
        (),
        {},
        set(),
        range(0),
        [0],
        [1, 2],
        [2, 2],
        [1.9],
        [2.0],
        [True],
        [-1],
        [10**9],
        [10**30],
        [float("nan")],
        ["a"],
        [None],
        [[1]],
        [[1], []],
        (2, 4),
        (4, 2),
        (0, 0),
        (0, 10**6),
        (1.5, 2),
        (1, 2, 3),
        {1: 2},
        {"a": [1]},
        {3},
        range(1, 3),
        np.int64(3),
        np.uint8(2),
        np.float64(0.5),
        np.float32("nan"),
        np.ones((), dtype=np.bool_)[()],
        np.array(3),
        np.array([1, 2]),
        np.array([1.5]),
        np.array([True] * ROWS),
        np.array([[1, 2]]),
        np.array([], dtype=np.int64),
        torch.tensor(3),
        torch.tensor([1, 2]),
        torch.tensor(0.5),
        torch.ones((), dtype=torch.bool),
        torch.tensor([1.5]),
        torch.tensor([[1, 2]]),
        torch.zeros(0, dtype=torch.long),
        pl.Series([1, 2]),
        object(),
        int,
        len,
        (number for number in (1, 2)),
        torch.float64,
        torch.int64,
        np.float32,
        Path("there"),
        nn.Linear(2, 2),
    ]


def is_whole(value: Any, least: int | None = None, most: int | None = None) -> bool:
    """Whether a value is a whole number of Python, numpy or torch within bounds."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        if value.ndim or "int" not in str(value.dtype):
            return False
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        return False
    return bool((least is None or value >= least) and (most is None or value <= most))


def is_real(value: Any, valid: Valid) -> bool:
    """Whether a value is a finite real number that fulfils a condition."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        if value.ndim or "bool" in str(value.dtype):
            return False
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        return False
    if not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return bool(np.isfinite(float(value)) and valid(float(value)))
    except OverflowError:
        return False


def whole(least: int | None = None, most: int | None = None, *, none: bool = False) -> Valid:
    """The domain of whole numbers within bounds."""
    return lambda value: is_whole(value, least, most) or (none and value is None)


def real(valid: Valid, *, none: bool = False) -> Valid:
    """The domain of real numbers that fulfil a condition."""
    return lambda value: is_real(value, valid) or (none and value is None)


def numbers(
    least: int | None,
    most: int | None,
    *,
    none: bool = False,
    empty: bool = False,
    distinct: bool = False,
) -> Valid:
    """The domain of several whole numbers."""

    def valid(value: Any) -> bool:
        if value is None:
            return none
        if isinstance(value, (str, bytes, Mapping, type)) or not hasattr(value, "__iter__"):
            return False
        # A generator is used up by looking at it, so whatever comes of it is right.
        if isinstance(value, Iterator):
            return True
        try:
            items = list(value)
        except TypeError:
            return False
        if distinct and len({int(item) for item in items if is_whole(item)}) < len(items):
            return False
        return (empty or bool(items)) and all(is_whole(item, least, most) for item in items)

    return valid


def pair(least: int, most: int, *, none: bool = False, strict: bool = False) -> Valid:
    """The domain of ranges of steps, or of states."""
    several = numbers(least, most)

    def valid(value: Any) -> bool:
        if value is None:
            return none
        if isinstance(value, (set, Iterator)):
            return isinstance(value, Iterator)
        if not several(value) or len(value) != 2:
            return False
        first, second = (int(item) for item in value)
        return first < second if strict else first <= second

    return valid


def one_of(*allowed: Any) -> Valid:
    """The domain of some words."""
    return lambda value: any(
        value is one or (type(value) is type(one) and _equal(value, one)) for one in allowed
    )


def _equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except (RuntimeError, ValueError, TypeError):
        return False


def either(*domains: Valid) -> Valid:
    """The domain of what is in one of several domains."""
    return lambda value: any(domain(value) for domain in domains)


def of_type(*kinds: type) -> Valid:
    """The domain of objects of some classes."""
    return lambda value: isinstance(value, kinds) and not isinstance(value, type)


def text(value: Any) -> bool:
    """The domain of strings that are not empty."""
    return isinstance(value, str) and bool(value)


def path(value: Any) -> bool:
    """The domain of paths."""
    is_path = isinstance(value, (str, Path)) and bool(str(value))
    return is_path and "\0" not in str(value) and len(str(value)) < 200


def function(value: Any) -> bool:
    """The domain of functions."""
    return callable(value)


def flag(value: Any) -> bool:
    """The domain of True and False."""
    return isinstance(value, (bool, np.bool_))


def nothing(value: Any) -> bool:
    """No value of the list is in the domain."""
    del value
    return False


def anything(value: Any) -> bool:
    """Every value of the list is in the domain."""
    del value
    return True


def none(value: Any) -> bool:
    """The domain of None."""
    return value is None


OBSERVED = either(one_of("end", "epochs"), whole(1, STEPS), numbers(1, STEPS))
SAMPLES = numbers(0, TRAINED - 1)
ROW_NUMBERS = numbers(0, ROWS - 1, none=True, distinct=True)
DTYPE = one_of(None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEED = whole(0, 2**63 - 1)
OUT = either(path, none)


@dataclass(frozen=True)
class Target:
    """A public function, right arguments, and the domains of those that are replaced."""

    name: str
    call: Callable[..., Any]
    right: Mapping[str, Any] = field(default_factory=dict)
    domains: Mapping[str, Valid] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one call did."""

    kind: str
    call: str
    detail: str = ""


class _TimeOut(BaseException):
    """A call took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise _TimeOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, arguments: Mapping[str, Any], *, valid: bool, shown: str) -> Outcome:
    """Make one call, and say what it did."""
    call = f"{target.name}({shown})"
    try:
        with time_limit(SECONDS):
            target.call(**arguments)
    except _TimeOut:
        return Outcome("hang", call)
    except backtrail.BacktrailError as error:
        return Outcome("BacktrailError", call, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
        frames = traceback.extract_tb(error.__traceback__)
        detail = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            return Outcome("keyword", call, detail)
        if isinstance(error, TypeError) and "required" in str(error) and len(frames) <= 3:
            return Outcome("keyword", call, detail)
        # The model, losses and queries of this file are a user's, and so is what collates rows.
        own = {frame.name for frame in frames if frame.filename == __file__}
        is_collate = "collate" in arguments and callable(arguments["collate"])
        if own & {"forward", "square", "fails"} or is_collate:
            return Outcome("user's own", call, detail)
        return Outcome("raw", call, f"{detail} [{frames[-1].filename}:{frames[-1].lineno}]")
    return Outcome("right" if valid else "nonsense", call)


def shown(value: Any) -> str:
    """A value in a few characters."""
    one_line = " ".join(repr(value).split())
    return f"{type(value).__name__} {one_line[:60]}"


class Model(nn.Module):
    """Two layers, and a parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scores of three classes."""
        return self.second(torch.tanh(self.first(inputs))) * self.scale.exp()


class World:
    """One tiny recorded training, and everything that is made of it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(ROWS, 3)
        self.data = TensorDataset(inputs, torch.arange(ROWS) % 3)
        self.model = Model()
        self.task = backtrail.classification(self.model, self.data)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        batches = [[first, first + 1] for first in range(0, TRAINED, 2)]
        self.loader = DataLoader(self.data, batch_sampler=batches)
        self.folder = folder
        self.states: list[tuple[int, dict[str, Any], float]] = []
        with backtrail.Recorder(
            folder / "run", self.task, self.optimizer, checkpoints=backtrail.Every(3)
        ) as recorder:
            for _ in range(2):
                for rows, labels in recorder.watch(self.loader):
                    self.optimizer.zero_grad()
                    cross_entropy(self.model(rows), labels).backward()
                    self.optimizer.step()
                state = {name: t.clone() for name, t in self.model.state_dict().items()}
                self.states.append((5 * len(self.states) + 5, state, 0.01))
        self.run = backtrail.open_run(folder / "run", self.task)
        self.queries = backtrail.Loss(self.data, samples=[0, 11])
        self.mean = backtrail.Loss(self.data, aggregate="mean")
        self.influence = backtrail.DIT().attribute(
            self.run, self.queries, observed_at=[3, 5, 8, 10], out=folder / "influence"
        )
        self.embeddings = backtrail.DataValueEmbedding(rank=4).embed(
            self.run, out=folder / "embeddings"
        )
        self.checkpoints = backtrail.Checkpoints(self.task, self.states, steps=STEPS)
        self.state_dict = self.states[-1][1]
        self.number = 0

    def fresh(self) -> Path:
        """A folder that does not exist yet."""
        self.number += 1
        return self.folder / f"fresh{self.number}"

    def read(self, query: backtrail.Query) -> Influence:
        """Use a query, so that what is only found out then is found out."""
        return backtrail.GradientDot().attribute(self.run, query)

    def recorder(self, **options: Any) -> backtrail.Recorder:
        """A recorder of the live model."""
        right: dict[str, Any] = {
            "path": self.fresh(),
            "task": self.task,
            "optimizer": self.optimizer,
        }
        return backtrail.Recorder(**(right | options))

    def record(self, task: backtrail.Task) -> None:
        """Record a step with a task."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        with backtrail.Recorder(self.fresh(), task, optimizer) as recorder:
            for rows, labels in recorder.watch(self.loader):
                optimizer.zero_grad()
                cross_entropy(self.model(rows), labels).backward()
                optimizer.step()
                break

    def walk(self, **arguments: Any) -> None:
        """Take the steps of a walk."""
        for _ in self.run.walk(**arguments):
            pass

    def fed(self, batch: Any) -> None:
        """Declare another batch inside a recorded loop."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        with backtrail.Recorder(self.fresh(), self.task, optimizer) as recorder:
            for _ in recorder.watch(self.loader):
                recorder.fed(batch)
                break


def fails(model: nn.Module) -> torch.Tensor:
    """A query of the user's own with a mistake in it.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(f"no such thing in {type(model).__name__}")


def square(outputs: Any, batch: Any) -> torch.Tensor:
    """A loss per row."""
    del batch
    return outputs.square().mean(1)


def targets(world: World) -> list[Target]:
    """Every public function and class, with right arguments."""
    run = world.run
    influence = world.influence
    is_run = of_type(backtrail.Run)
    query = either(whole(0, 1), one_of(*world.queries.names))
    state = either(one_of("end"), one_of(3, 5, 8, 10))
    state_numbers = either(state, lambda v: is_whole(v) and int(v) in {3, 5, 8, 10})
    window = pair(0, STEPS, none=True)
    is_query = of_type(backtrail.Query)
    found: list[Target] = []

    def add(
        target: str, call: Callable[..., Any], right: Mapping[str, Any], /, **domains: Valid
    ) -> None:
        found.append(Target(target, call, right, domains))

    # Policies, clipping, tasks.
    add("Every", backtrail.Every, {"period": 3}, period=whole(1))
    add("Epochs", backtrail.Epochs, {}, period=whole(1))
    add(
        "Geometric.keeps",
        lambda ratio: backtrail.Geometric(ratio).keeps(10**6, opens_epoch=None),
        {"ratio": 1.2},
        ratio=real(lambda v: v > 1),
    )
    add("Only", backtrail.Only, {"steps": [1]}, steps=numbers(0, None, empty=True))
    add("Last", backtrail.Last, {"window": 3}, window=whole(1))
    clip = either(real(lambda v: v > 0), one_of(float("inf")))
    add("ClipNorm", backtrail.ClipNorm, {"max_norm": 1.0}, max_norm=clip, norm_type=clip)
    add("ClipValue", backtrail.ClipValue, {"max_value": 1.0}, max_value=clip)
    add("TokenMean", backtrail.TokenMean, {}, over=one_of("step", "batch"))
    task = {"model": world.model, "data": world.data}
    common: dict[str, Valid] = {
        "model": of_type(nn.Module),
        "predict": function,
        "collate": function,
        "penalty": either(none, function),
        "reduce": either(function, one_of("mean", "sum")),
        "clip": none,
        "draw": either(none, function),
        "ids": either(none, function, of_type(str), whole()),
    }
    add("Task", backtrail.Task, {**task, "loss": square}, **common, loss=function)
    add("classification", backtrail.classification, task, **common)
    add("regression", backtrail.regression, task, **common)
    add("language_model", backtrail.language_model, task, **common)
    add(
        "Task(data=).record",
        lambda data: world.record(backtrail.classification(world.model, data)),
        {"data": world.data},
        data=nothing,
    )
    # Queries.
    query_options: dict[str, Valid] = {
        "data": nothing,
        "samples": ROW_NUMBERS,
        "aggregate": one_of(None, "mean", "sum"),
        "mode": one_of("eval", "train"),
        "collate": none,
        "batch": whole(1),
    }
    data = {"data": world.data, "samples": [0, 3]}
    add("Loss", lambda **k: world.read(backtrail.Loss(**k)), data, **query_options, unit=text)
    add(
        "Logit",
        lambda **k: world.read(backtrail.Logit(**k)),
        data,
        **query_options,
        target=whole(0, 2, none=True),
    )
    add("Margin", lambda **k: world.read(backtrail.Margin(**k)), data, **query_options)
    feature = {**data, "layer": "first", "unit": 1}
    add(
        "Feature",
        lambda **k: world.read(backtrail.Feature(**k)),
        feature,
        **query_options,
        layer=nothing,
        unit=whole(0, 3),
    )
    add(
        "Saliency",
        lambda **k: world.read(backtrail.Saliency(**k)),
        {**data, "inputs": [0, 2]},
        **query_options,
        inputs=numbers(0, 2, distinct=True),
    )

    def entries(value: Any) -> bool:
        if isinstance(value, Iterator):
            return True
        inside = numbers(-4, 3, distinct=True)(value)
        return inside or (isinstance(value, list) and value == [[1]])

    add(
        "Parameter",
        lambda **k: world.read(backtrail.Parameter(**k)),
        {"name": "first.bias", "entries": [0]},
        name=nothing,
        entries=entries,
        unit=text,
        mode=one_of("eval", "train"),
    )
    add(
        "Custom",
        lambda **k: world.read(backtrail.Custom(**k)),
        {"function": lambda model: model.scale},
        function=nothing,
        labels=lambda v: (
            (isinstance(v, list) and v == ["a"]) or (isinstance(v, dict) and v == {"a": [1]})
        ),
        unit=text,
        mode=one_of("eval", "train"),
    )
    add(
        "Custom(fails)",
        lambda unit: world.read(backtrail.Custom(fails, unit=unit)),
        {"unit": "nats"},
        unit=text,
    )
    add(
        "Averaged",
        lambda **k: backtrail.DIT().attribute(run, backtrail.Averaged(**k)),
        {"queries": world.queries},
        queries=nothing,
        decay=real(lambda v: 0 <= v < 1, none=True),
        start=whole(0),
        every=whole(1),
        use_buffers=flag,
    )
    # Recording and reading a run.
    add(
        "Recorder",
        world.recorder,
        {},
        path=path,
        task=nothing,
        optimizer=nothing,
        checkpoints=none,
        keep_batches=flag,
        tolerance=real(lambda v: v > 0, none=True),
        capture=none,
    )
    add("Recorder.watch", world.recorder().watch, {"loader": world.loader}, loader=nothing)
    add("Recorder.fed", world.fed, {"batch": world.data[:2]}, batch=nothing)
    add(
        "open_run",
        backtrail.open_run,
        {"path": world.folder / "run", "task": world.task},
        path=nothing,
        task=nothing,
        tolerance=real(lambda v: v > 0, none=True),
    )
    add("Run.step", run.step, {"index": 0}, index=whole(0, STEPS - 1))
    add("Run.batches", run.batches, {"index": 0}, index=whole(0, STEPS - 1))
    add("Run.transition", run.transition, {"index": 0}, index=whole(0, STEPS - 1), dtype=DTYPE)
    add(
        "Run.state",
        run.state,
        {"number": 4, "replay": True},
        number=whole(0, STEPS),
        replay=flag,
        dtype=DTYPE,
    )
    add(
        "Run.walk",
        world.walk,
        {"first": 2, "last": 4},
        first=whole(0, 4),
        last=whole(2, STEPS),
        dtype=DTYPE,
    )
    add("Run.verify", run.verify, {}, tolerance=real(lambda v: v > 0, none=True))
    # Methods.
    dit: dict[str, Valid] = {
        "curvature": nothing,
        "slope": nothing,
        "denominator": one_of("keep", "renormalize"),
        "memory": whole(1, none=True),
        "chunk": whole(1, none=True),
    }
    ask = {"run": run, "queries": world.queries}
    asked: dict[str, Valid] = {
        "run": is_run,
        "queries": is_query,
        "observed_at": OBSERVED,
        "out": OUT,
    }
    limits = {"memory": whole(1, none=True), "chunk": whole(1, none=True)}
    add("DIT", lambda **k: backtrail.DIT(**k).attribute(run, world.mean), {}, **dit)
    add(
        "TracIn",
        lambda **k: backtrail.TracIn(**k).attribute(run, world.mean),
        {},
        states=one_of("every", "kept"),
        **limits,
    )
    add(
        "GradientDot",
        lambda **k: backtrail.GradientDot(**k).attribute(run, world.mean),
        {},
        **limits,
    )
    add("DIT.attribute", backtrail.DIT().attribute, ask, **asked)
    add("TracIn.attribute", backtrail.TracIn().attribute, ask, **asked)
    add("GradientDot.attribute", backtrail.GradientDot().attribute, ask, **asked)
    small = backtrail.DataValueEmbedding(rank=4)
    add("DataValueEmbedding.attribute", small.attribute, ask, **asked)
    add(
        "DataValueEmbedding.embed",
        small.embed,
        {"run": run},
        run=is_run,
        observed_at=OBSERVED,
        out=OUT,
    )
    add(
        "DataValueEmbedding",
        lambda **k: backtrail.DataValueEmbedding(**({"rank": 4} | k)).embed(run),
        {},
        rank=whole(1),
        fisher=one_of("true", "empirical"),
        drawn=real(lambda v: 0 < v <= 1),
        projection=one_of("orthonormal", "gaussian", "mask"),
        follow=one_of("optimizer", "rate"),
        layers=one_of("apart", "together"),
        damping=real(lambda v: v >= 0),
        segments=whole(1, STEPS),
        seed=SEED,
    )
    add(
        "DataValueEmbedding.gather",
        lambda **k: small.gather(**({"out": world.fresh()} | k)),
        {"run": run, "part": (0, 2)},
        run=is_run,
        part=lambda v: pair(0, 10**6, strict=True)(v) and not isinstance(v, set),
        out=path,
        observed_at=OBSERVED,
    )
    embeddings = world.embeddings
    add(
        "Embeddings.values",
        embeddings.values,
        {},
        start=whole(0, STEPS),
        stop=whole(0, STEPS, none=True),
    )
    ends = either(one_of("end"), whole(STEPS, STEPS))
    add(
        "Embeddings.attribute",
        embeddings.attribute,
        {"queries": world.queries},
        queries=is_query,
        observed_at=ends,
        out=OUT,
    )
    order = one_of("harmful", "helpful", "absolute")
    add(
        "Embeddings.top",
        embeddings.top,
        {"queries": world.queries},
        queries=is_query,
        k=whole(1),
        order=order,
    )
    add(
        "Embeddings.nearest",
        embeddings.nearest,
        {"sample": 1},
        sample=whole(0, TRAINED - 1),
        k=whole(1),
    )
    add(
        "open_embeddings",
        backtrail.open_embeddings,
        {"path": world.folder / "embeddings", "run": run},
        path=nothing,
        run=nothing,
    )
    checkpoints = either(whole(1), numbers(1, STEPS))
    add(
        "DiffIn",
        lambda **k: backtrail.DiffIn(**k).attribute(run, world.mean),
        {},
        checkpoints=checkpoints,
        form=one_of("published", "corrected"),
        batch=whole(1),
        epsilon=real(lambda v: v > 0),
        seed=SEED,
        sides=one_of("central", "one-sided"),
        rank=whole(1, none=True),
        chunk=whole(1, none=True),
    )
    diff_in = backtrail.DiffIn(2)
    add(
        "DiffIn.attribute",
        diff_in.attribute,
        ask,
        **(asked | {"observed_at": either(OBSERVED, one_of("checkpoints"))}),
    )
    add(
        "DiffIn.self_influence",
        diff_in.self_influence,
        {"run": run, "samples": [1]},
        run=is_run,
        samples=either(none, SAMPLES),
    )
    add(
        "DiffIn.parameter_change",
        diff_in.parameter_change,
        {"run": run, "samples": [1]},
        run=is_run,
        samples=SAMPLES,
    )
    add(
        "DiffIn.attribute(Checkpoints)",
        diff_in.attribute,
        {"run": world.checkpoints, "queries": world.queries},
        **(asked | {"observed_at": one_of("end", "checkpoints")}),
    )
    add(
        "Checkpoints",
        backtrail.Checkpoints,
        {"task": world.task, "source": world.states, "steps": STEPS},
        task=nothing,
        source=nothing,
        steps=whole(STEPS),
        lr=anything,
    )
    for name in ("Hessian", "GaussNewton", "EmpiricalFisher", "Zero"):
        add(name, getattr(backtrail, name), {}, product=one_of("autograd", "difference"))
    add("Secant", backtrail.Secant, {}, width=real(lambda v: v > 0))
    # Ground truth.
    removal_options: dict[str, Valid] = {
        "run": is_run,
        "queries": is_query,
        "steps": pair(0, STEPS, none=True),
        "denominator": one_of("keep", "renormalize"),
        "dtype": DTYPE,
        "batch": whole(1, none=True),
        "weight": real(anything),
        "bank": OUT,
    }
    add(
        "leave_one_out",
        backtrail.leave_one_out,
        {**ask, "samples": [1, 2]},
        **removal_options,
        samples=SAMPLES,
        window=window,
    )

    def groups(value: Any) -> bool:
        if isinstance(value, Iterator):
            return True
        if not isinstance(value, (list, np.ndarray, torch.Tensor)):
            return False
        return len(value) > 0 and all(SAMPLES(group) for group in value)

    add(
        "retrain",
        backtrail.retrain,
        {**ask, "removals": [[1], [2, 3]]},
        **removal_options,
        removals=groups,
        observed_at=OBSERVED,
    )
    # Reading an influence.
    add(
        "open_influence",
        backtrail.open_influence,
        {"path": world.folder / "influence"},
        path=anything,
    )
    add(
        "Influence.values",
        influence.values,
        {},
        start=whole(0, STEPS),
        stop=whole(0, STEPS, none=True),
    )
    add("Influence.total", influence.total, {}, query=either(none, query), out=none)
    kept = lambda v: is_whole(v) and int(v) in {0, 3, 5, 8, 10}  # noqa: E731
    add(
        "Influence.window",
        influence.window,
        {"a": 3, "b": 8},
        a=lambda v: kept(v) and v <= 8,
        b=lambda v: kept(v) and v >= 3,
    )
    add(
        "Influence.visits",
        influence.visits,
        {"a": 3, "b": 8},
        a=whole(0, 8),
        b=whole(3, STEPS),
        observed_at=state_numbers,
    )
    one = whole(0, TRAINED - 1)
    add("Influence.curve", influence.curve, {"sample": 1}, sample=one, query=query)
    add(
        "Influence.visits_curve",
        influence.visits_curve,
        {"sample": 1},
        sample=one,
        query=query,
        observed_at=state_numbers,
    )

    def observed_window(value: Any) -> bool:
        if isinstance(value, Iterator) or value is None:
            return True
        return pair(0, STEPS)(value) and all(kept(item) for item in value)

    add(
        "Influence.top",
        influence.top,
        {},
        k=whole(1),
        query=query,
        order=order,
        window=observed_window,
        observed_at=state_numbers,
    )
    add(
        "Influence.to_parquet",
        influence.to_parquet,
        {"path": world.folder / "table.parquet"},
        path=path,
    )
    add("Influence.check_run", influence.check_run, {"run": run}, run=is_run)
    above_one = real(lambda v: v > 1)
    positive = real(lambda v: v > 0)
    is_influence = of_type(Influence)
    add(
        "patterns",
        backtrail.patterns,
        {"influence": influence},
        influence=is_influence,
        query=query,
        ratio=above_one,
        spread=positive,
    )
    add(
        "regimes",
        backtrail.regimes,
        {"run": run, "influence": influence},
        run=is_run,
        influence=is_influence,
        observed_at=state_numbers,
        query=either(none, query),
        ratio=positive,
    )
    # Applications.
    share = real(lambda v: 0 < v <= 1)
    methods = ("dve", "dit", "diff-in", "tracin", "herding", "el2n", "loss", "random")
    among = either(none, numbers(0, ROWS - 1))
    add(
        "select_coreset",
        backtrail.select_coreset,
        {"run": run, "method": "random"},
        run=is_run,
        fraction=share,
        queries=none,
        method=one_of(*methods),
        balanced=either(none, of_type(bool)),
        among=among,
        seed=SEED,
    )
    add(
        "compare_coresets",
        backtrail.compare_coresets,
        {**ask, "coresets": {"mine": [0, 1, 2]}, "draws": 1},
        run=is_run,
        queries=is_query,
        coresets=lambda v: isinstance(v, dict) and v == {"a": [1]},
        draws=whole(0, 1000),
        seed=SEED,
        dtype=DTYPE,
    )
    add(
        "trust",
        backtrail.trust,
        {"run": run, "influence": influence, "removals": 3},
        run=is_run,
        influence=is_influence,
        queries=either(none, is_query),
        removals=whole(1),
        seed=SEED,
    )

    def shares(value: Any) -> bool:
        if isinstance(value, Iterator):
            return True
        is_other = isinstance(value, (str, bytes, dict)) or not hasattr(value, "__len__")
        if is_other or np.ndim(value) != 1:
            return False
        return all(is_real(item, lambda share: 0 < share < 1) for item in value)

    add(
        "evaluate",
        backtrail.evaluate,
        {"run": run, "influence": influence, "removals": 3, "groups": 2},
        run=is_run,
        influence=is_influence,
        queries=either(none, is_query),
        wrong=either(none, numbers(0, ROWS - 1)),
        removals=lambda v: is_whole(v, 0) and int(v) != 1,
        shares=shares,
        groups=lambda v: is_whole(v, 0, 1000) and int(v) != 1,
        seed=SEED,
        bank=OUT,
    )

    def ranges(value: Any) -> bool:
        return value is None

    add(
        "worth_selecting",
        backtrail.worth_selecting,
        {**ask, "influence": influence, "ranges": {"all": [(0, 10)]}, "drop": 0.5},
        run=is_run,
        queries=is_query,
        influence=is_influence,
        ranges=ranges,
        drop=real(lambda v: 0 < v < 1),
        seed=SEED,
    )
    add(
        "forget",
        backtrail.forget,
        {"run": run, "samples": [1]},
        run=is_run,
        samples=SAMPLES,
        method=none,
        replay=whole(0, STEPS),
        dtype=DTYPE,
    )
    add(
        "judge_forgetting",
        backtrail.judge_forgetting,
        {"run": run, "samples": [1], "state": world.state_dict, "test": world.data},
        run=is_run,
        samples=SAMPLES,
        state=nothing,
        test=nothing,
        denominator=one_of("keep", "renormalize"),
    )
    rankings = (
        "mean-loss",
        "held-out",
        "margin",
        "el2n",
        "loss",
        "tracin",
        "self-influence",
        "dit",
        "dve",
    )
    add(
        "find_mislabeled",
        backtrail.find_mislabeled,
        {"run": run},
        run=is_run,
        method=one_of(*rankings),
        validation=none,
        window=none,
        checkpoints=checkpoints,
        out=none,
    )
    add(
        "find_mislabeled(Influence)",
        backtrail.find_mislabeled,
        {"run": run, "method": influence},
        window=lambda v: (
            v is None
            or isinstance(v, Iterator)
            or (pair(0, STEPS, strict=True)(v) and all(kept(i) for i in v))
        ),
    )
    add("acceleration", backtrail.acceleration, {"enabled": True}, enabled=flag)
    # Plots.
    add(
        "plot.curve",
        plot.curve,
        {"influence": influence, "sample": 1},
        influence=is_influence,
        sample=one,
        query=query,
        ax=none,
    )
    add(
        "plot.visits",
        plot.visits,
        {"influence": influence, "sample": 1},
        influence=is_influence,
        sample=one,
        query=query,
        observed_at=state_numbers,
        ax=none,
    )
    add(
        "plot.heatmap",
        plot.heatmap,
        {"influence": influence, "samples": [1, 2]},
        influence=is_influence,
        samples=numbers(0, TRAINED - 1),
        query=query,
        ax=none,
    )
    add(
        "plot.patterns",
        plot.patterns,
        {"found": influence},
        found=is_influence,
        query=query,
        ax=none,
    )
    table = backtrail.find_mislabeled(run)
    add(
        "plot.detection",
        plot.detection,
        {"found": table, "wrong": [1]},
        found=nothing,
        wrong=numbers(0, ROWS - 1),
        ax=none,
    )

    def effects(value: Any) -> bool:
        return isinstance(value, tuple) and value == (1, 2, 3)

    add(
        "plot.scatter",
        plot.scatter,
        {"predicted": np.arange(3.0), "actual": np.arange(3.0)},
        predicted=effects,
        actual=effects,
        ax=none,
    )
    add("plot.regimes", plot.regimes, {"found": None}, found=nothing, ax=none)
    return found


def fuzz(calls: int, seed: int = 0) -> list[Outcome]:
    """Make so many calls, of a random choice of functions and arguments."""
    generator = random.Random(seed)
    before = Path.cwd()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(scratch)
        try:
            world = World(Path(scratch))
            known = targets(world)
            cases = [(target, name) for target in known for name in target.domains]
            generator.shuffle(cases)
            for number in range(calls):
                target, name = cases[number % len(cases)]
                outcomes.append(_one(target, name, generator))
        finally:
            os.chdir(before)
            plt.close("all")
    return outcomes


def _one(target: Target, name: str, generator: random.Random) -> Outcome:
    if generator.random() < 0.02:
        arguments = dict(target.right) | {f"{name}_": None}
        return attempt(target, arguments, valid=False, shown=f"{name}_=None")
    value = generator.choice(wrong_values())
    description = f"{name}={shown(value)}"
    valid = target.domains[name](value)
    return attempt(target, dict(target.right) | {name: value}, valid=valid, shown=description)


def main(arguments: Sequence[str]) -> int:
    """Report what happened; 1 where something must not."""
    calls = int(arguments[0]) if arguments else 5000
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    outcomes = fuzz(calls, seed)
    counts = Counter(outcome.kind for outcome in outcomes)
    for kind in OUTCOMES:
        sys.stdout.write(f"{kind:15} {counts[kind]:6}\n")
    bad = [outcome for outcome in outcomes if outcome.kind in BAD]
    for outcome in bad:
        sys.stdout.write(f"{outcome.kind}: {outcome.call}  {outcome.detail}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
