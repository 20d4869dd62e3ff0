"""The table of optimizers covers all of torch.optim, and its facts are those of the optimizers.

Facts are checked with the optimizers of `tests/cases.py` and their options there, so one that is
added there is checked here as well.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backtrail.errors import UnsupportedOptimizer
from backtrail.step.optimizers import (
    COUNTS,
    NONNEGATIVE,
    REFUSED,
    RULES,
    OptimizerRule,
    find_rule,
    rule_named,
)
from backtrail.step.state import State, elementwise_keys, settings_of
from backtrail.step.update import Update, tensors_of
from backtrail.tree import Tree
from tests.cases import CASES, one_group
from tests.step.updates import SETTINGS

RECORDING = Path(__file__).resolve().parents[2] / "docs" / "recording.md"
OPTIMIZERS = [case.optimizer for case in CASES if case.name != "two groups"]
OPTIMIZERS += [
    one_group(RULES[kind].optimizer_class, **options) for kind, options in SETTINGS.items()
]


@pytest.fixture(autouse=True)
def counts_in_float64() -> Iterator[None]:
    """Make optimizers create their counts in float64: float32 would hide small differences."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Training:
    """An optimizer on one parameter of six entries, some steps after its start."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> None:
        draw = torch.Generator().manual_seed(3)
        layer = nn.Linear(3, 2, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, generator=draw, dtype=torch.float64))
        optimizer = make(layer)
        for _ in range(steps):
            layer.weight.grad = torch.randn(2, 3, generator=draw, dtype=torch.float64)
            optimizer.step()
        self.rule = find_rule(type(optimizer))
        self.gradient = torch.randn(2, 3, generator=draw, dtype=torch.float64)
        moments = tensors_of(optimizer.state[layer.weight]) if steps else {}
        copies = {key: tensor.clone() for key, tensor in moments.items()}
        self.state = State({"w": layer.weight.detach().clone()}, {}, {"w": copies})
        settings = settings_of(optimizer.param_groups[0])
        self.update = Update(self.rule.name, (("w",),), (settings,))

    @property
    def moments(self) -> Tree:
        """Those of the parameter before the next step."""
        return self.state.moments["w"]

    def after(self, gradient: Tensor, moments: Tree | None = None) -> Tree:
        """Parameter and moments after a step."""
        before = self.moments if moments is None else moments
        state = State(self.state.params, {}, {"w": before})
        found = self.update(state, {"w": gradient})
        return found.moments["w"] | {"parameter": found.params["w"]}


def trainings(rule: OptimizerRule, steps: int) -> Iterator[Training]:
    """Those of a rule's optimizer."""
    for make in OPTIMIZERS:
        training = Training(make, steps)
        if training.rule is rule:
            yield training


every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)


def test_every_optimizer_of_torch_is_supported_or_refused() -> None:
    """A class that a new torch brings has to be put in one of the two tables."""
    public = {
        name
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member) and issubclass(member, torch.optim.Optimizer)
    }
    assert public - {"Optimizer"} <= RULES.keys() | REFUSED.keys()
    assert RULES.keys() <= public
    assert not RULES.keys() & REFUSED.keys()


@every_rule
def test_every_supported_optimizer_has_a_case(rule: OptimizerRule) -> None:
    """Without one its facts are not checked."""
    assert any(trainings(rule, 0))


def test_the_documentation_lists_the_supported_optimizers() -> None:
    """In the order of the table."""
    listed = re.search(r"optimizers other than (.*), and subclasses", RECORDING.read_text("utf-8"))
    assert listed is not None
    assert listed[1].split(", ") == list(RULES)


@every_rule
def test_every_tensor_of_the_state_has_one_role(rule: OptimizerRule) -> None:
    """The optimizer keeps exactly the tensors that the rule names, over all of its options."""
    kept: set[str] = set()
    for training in trainings(rule, 3):
        kept |= training.moments.keys()
    assert kept == rule.counts | rule.elementwise
    roles = [
        rule.counts,
        rule.first_moments,
        rule.second_moments,
        rule.gradient_means,
        rule.squared_updates,
        rule.averaged_parameters,
    ]
    assert sum(map(len, roles)) == len(frozenset().union(*roles))


@every_rule
def test_counts_are_scalars_that_ignore_the_gradient(rule: OptimizerRule) -> None:
    """All else has the parameter's shape."""
    for training in trainings(rule, 3):
        one = training.after(training.gradient)
        other = training.after(-2 * training.gradient)
        for key, tensor in training.moments.items():
            assert tensor.dim() == (0 if key in rule.counts else 2)
            if key in rule.counts:
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
        assert set(elementwise_keys(training.moments, training.gradient)) <= rule.elementwise


@every_rule
def test_what_cannot_be_negative_is_not(rule: OptimizerRule) -> None:
    """And a second moment is positive once a gradient came."""
    for training in trainings(rule, 1):
        after = training.after(-training.gradient)
        for key in rule.nonnegative & after.keys():
            assert (after[key] >= 0).all()
        for key in rule.second_moments & after.keys():
            assert (after[key] > 0).all()


@every_rule
def test_second_moments_divide_the_step(rule: OptimizerRule) -> None:
    """The larger they are, the smaller the step that the gradient causes."""
    for training in trainings(rule, 8):
        # A centred divisor is the variance: without the mean it grows with the second moment alone.
        moments = dict(training.moments)
        for key in rule.gradient_means & moments.keys():
            moments[key] = torch.zeros_like(moments[key])
        larger = dict(moments)
        for key in rule.second_moments & moments.keys():
            larger[key] = 9 * moments[key]
        step = moved(training, moments)
        small = moved(training, larger)
        if rule.second_moments:
            assert (small < step).all(), training.update.settings
        else:
            torch.testing.assert_close(small, step, rtol=0, atol=0)


def moved(training: Training, moments: Tree) -> Tensor:
    """Size of the part of a step that a gradient, and a first moment along it, cause."""
    along = dict(moments)
    for key in training.rule.first_moments & moments.keys():
        along[key] = training.gradient
    still = {
        key: torch.zeros_like(along[key]) for key in training.rule.first_moments & along.keys()
    }
    weight = training.state.params["w"]
    with_gradient = training.after(training.gradient, along)["parameter"]
    without = training.after(torch.zeros_like(weight), along | still)["parameter"]
    return (with_gradient - without).abs()


@every_rule
def test_linear_means_linear(rule: OptimizerRule) -> None:
    """The update at the mean of two gradients is the mean of the updates, and only then."""
    for training in trainings(rule, 8):
        one = training.gradient
        other = -0.3 * one.flip(0)
        mean = (training.after(one)["parameter"] + training.after(other)["parameter"]) / 2
        middle = training.after((one + other) / 2)["parameter"]
        assert torch.allclose(mean, middle, rtol=1e-12, atol=1e-12) == rule.linear


@every_rule
def test_the_first_step_starts_from_the_given_values(rule: OptimizerRule) -> None:
    """Handed to the optimizer, they lead to what it makes itself of its first step."""
    for training in trainings(rule, 0):
        settings = training.update.settings[0]
        truth = training.after(training.gradient)
        if rule.differentiable_start is None:
            moments = {key: truth[key] for key in truth if key != "parameter"}
            start = rule.start(moments, settings)
        else:
            start = rule.differentiable_start(
                settings, training.state.params["w"], training.gradient
            )
        found = training.after(training.gradient, start)
        for key, tensor in truth.items():
            torch.testing.assert_close(found[key].to(tensor), tensor, rtol=1e-12, atol=1e-15)


@every_rule
@pytest.mark.parametrize("steps", [0, 3])
def test_the_differentiable_mode_gives_the_same_update(rule: OptimizerRule, steps: int) -> None:
    """And a graph: of the parameter always, of the moments where the rule says nothing else."""
    for training in trainings(rule, steps):
        gradient = training.gradient.clone().requires_grad_()
        leaf = training.state.params["w"].clone().requires_grad_()
        params, moments = training.update.run(
            {"w": leaf}, training.state.moments, {"w": gradient}, differentiable=True
        )
        truth = training.after(training.gradient)
        torch.testing.assert_close(params["w"], truth["parameter"], rtol=1e-12, atol=1e-15)
        for key, tensor in moments["w"].items():
            torch.testing.assert_close(tensor, truth[key], rtol=1e-12, atol=1e-15)
            if rule.differentiable_start is None or steps:
                assert tensor.requires_grad == (key not in rule.counts), key


@every_rule
def test_a_rate_of_zero_is_divided_by_only_where_the_rule_says_so(rule: OptimizerRule) -> None:
    """Elsewhere torch's derivative is finite."""
    for training in trainings(rule, 3):
        gradient = training.gradient.clone().requires_grad_()
        settings: dict[str, Any] = training.update.settings[0] | {"lr": 0.0}
        params, _ = Update(rule.name, (("w",),), (settings,)).run(
            training.state.params, training.state.moments, {"w": gradient}, differentiable=True
        )
        (slope,) = torch.autograd.grad(params["w"].sum(), gradient)
        assert rule.divides_by_lr or slope.isfinite().all()


def test_keys_mean_the_same_in_every_optimizer() -> None:
    """So a state alone tells which of its tensors are counts, and which cannot be negative."""
    for rule in RULES.values():
        assert not rule.elementwise & COUNTS
        assert rule.elementwise & NONNEGATIVE == rule.nonnegative


def test_refusals_are_what_torch_says() -> None:
    """All but Rprop have no differentiable mode; Rprop ignores the size of a gradient."""
    for name in REFUSED:
        optimizer_class = getattr(torch.optim, name, None)
        if optimizer_class is not None and name != "Rprop":
            assert "differentiable" not in inspect.signature(optimizer_class).parameters
    ends = []
    for scale in (1.0, 7.0):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Rprop([parameter])
        for gradient in (torch.tensor([1.0, -2.0, 0.1]), torch.tensor([-1.0, -1.0, 0.3])):
            parameter.grad = scale * gradient
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_optimizers_and_their_subclasses_get_the_reason(name: str) -> None:
    """With the names of those that can be used."""
    optimizer_class = getattr(torch.optim, name, None)
    if optimizer_class is None:
        pytest.skip(f"this torch has no {name}")
    child = type("Mine", (optimizer_class,), {})
    for refused in (optimizer_class, child):
        with pytest.raises(UnsupportedOptimizer, match=re.escape(REFUSED[name])) as error:
            find_rule(refused)
        assert refused.__name__ in str(error.value)
        assert "Supported: SGD, Adam, AdamW" in str(error.value)
    with pytest.raises(UnsupportedOptimizer, match=re.escape(REFUSED[name])):
        rule_named(name)


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    """It may have another update; and a class that only has the name is not torch's."""

    class Mine(torch.optim.SGD):
        pass

    class AdamW(torch.optim.Optimizer):
        pass

    with pytest.raises(UnsupportedOptimizer, match=r"Mine .* a subclass of SGD"):
        find_rule(Mine)
    with pytest.raises(UnsupportedOptimizer, match="not one of the elementwise optimizers"):
        find_rule(AdamW)
    with pytest.raises(UnsupportedOptimizer, match="no rule for it"):
        rule_named("Mine")
    assert find_rule(torch.optim.AdamW) is RULES["AdamW"]
