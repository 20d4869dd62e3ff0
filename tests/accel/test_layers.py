"""Layers with a hand-written double backward have torch's derivatives, first, second and third."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as differentiated
from torch.func import jvp, vmap
from torch.nn import functional
from torch.nn.functional import gelu, layer_norm, mish, silu
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    NewGELUActivation,
    QuickGELUActivation,
)

import backtrail
from backtrail.accel import second_order
from backtrail.accel.context import accelerated
from backtrail.accel.layers import mark_activation
from tests.curvature.problems import problem

Layer = Callable[..., Tensor]
Leaves = tuple[Tensor, ...]

grad = partial(differentiated, allow_unused=True, materialize_grads=True)
SHAPE, AXES = (3, 4, 5), (4, 5)
LAYERS: dict[str, tuple[Layer, tuple[tuple[int, ...], ...]]] = {
    "gelu": (gelu, (SHAPE,)),
    "gelu, by tanh": (lambda x: gelu(x, approximate="tanh"), (SHAPE,)),
    "silu": (silu, (SHAPE,)),
    "silu in place": (lambda x: silu(1 * x, inplace=True), (SHAPE,)),
    "mish": (mish, (SHAPE,)),
    "norm": (lambda x, w, b: layer_norm(x, SHAPE[-1:], w, b, 0.1), (SHAPE, SHAPE[-1:], SHAPE[-1:])),
    "norm of two axes": (lambda x, w, b: layer_norm(x, AXES, w, b), (SHAPE, AXES, AXES)),
    "norm without a shift": (lambda x, w: layer_norm(x, SHAPE[-1:], w), (SHAPE, SHAPE[-1:])),
}
for composed in (
    NewGELUActivation,
    FastGELUActivation,
    QuickGELUActivation,
    AccurateGELUActivation,
):
    mark_activation(activation := composed())
    LAYERS[composed.__name__] = (activation, (SHAPE,))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers count as large."""
    monkeypatch.setattr(second_order, "MIN_ENTRIES", 1)


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> Leaves:
    """Random tensors, to be differentiated by."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes
    )


def twice(layer: Layer, inputs: Leaves, *, third: bool = False) -> tuple[Leaves, Leaves, Leaves]:
    """The gradient of a layer, and the derivatives of its product with a direction."""
    value = layer(*inputs)
    (slope,) = drawn(value.shape, seed=1)
    first = grad(value, inputs, slope, create_graph=True)
    directions = drawn(*(tensor.shape for tensor in first), seed=2)
    return (
        first,
        grad(first, (slope, *inputs), directions, retain_graph=True, create_graph=third),
        (slope, *directions),
    )


def both(name: str) -> Iterator[tuple[Tensor, Leaves]]:
    """A layer's value and its inputs, as torch has it and then recorded."""
    layer, shapes = LAYERS[name]
    for recorded in (False, True):
        inputs = drawn(*shapes)
        with accelerated(second_order="forward") if recorded else nullcontext():
            value = layer(*inputs)
        yield value, inputs


def assert_same(found: Leaves, expected: Leaves) -> None:
    """Equal to rounding."""
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives(name: str) -> None:
    """As torch takes them."""
    layer, shapes = LAYERS[name]
    expected = twice(layer, drawn(*shapes))
    with accelerated(second_order="forward"):
        found = twice(layer, drawn(*shapes))
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


@pytest.mark.parametrize("name", LAYERS)
def test_third_derivatives(name: str) -> None:
    """For models that differentiate themselves."""
    layer, shapes = LAYERS[name]
    thirds = []
    for recorded in (False, True):
        inputs = drawn(*shapes)
        if recorded:
            with accelerated(second_order="forward"):
                _, second, others = twice(layer, inputs, third=True)
        else:
            _, second, others = twice(layer, inputs, third=True)
        total = torch.stack([tensor.square().sum() for tensor in second]).sum()
        thirds.append(grad(total, (*inputs, *others)))
    assert_same(*thirds)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_as_a_function_of_its_cotangent_alone(name: str) -> None:
    """A stack of directions, differentiated by the slope; other gradients keep their inputs."""
    found = []
    for value, inputs in both(name):
        (slope,) = drawn(value.shape, seed=1)
        with accelerated(second_order="gradient"):
            linear = grad(value, inputs, slope, create_graph=True)
        first = grad(value, inputs, slope, create_graph=True)
        many = drawn(*((2, *tensor.shape) for tensor in first), seed=2)
        at = (slope, *inputs)
        pushed = vmap(
            lambda *a, linear=linear, slope=slope: grad(linear, (slope,), a, retain_graph=True)
        )(*many)
        pulled = vmap(lambda *a, first=first, at=at: grad(first, at, a, retain_graph=True))(*many)
        found.append((*pushed, *pulled))
    assert_same(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_directions_of_some(name: str) -> None:
    """A stack of directions for one of the gradients, where the others count for nothing."""
    found = []
    for value, inputs in both(name):
        (slope,) = drawn(value.shape, seed=1)
        pulled: list[Tensor] = []
        for one in grad(value, inputs, slope, create_graph=True):
            (many,) = drawn((2, *one.shape), seed=2)
            pulled += vmap(
                lambda a, one=one, at=(slope, *inputs): grad(one, at, a, retain_graph=True)
            )(many)
        found.append(tuple(pulled))
    assert_same(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_two_gradients_of_one_call(name: str) -> None:
    """Differentiated in one pass, with the value itself."""
    found = []
    for value, inputs in both(name):
        slopes = drawn(value.shape, value.shape, value.shape, seed=1)
        firsts = [
            *grad(value, inputs, slopes[0], create_graph=True),
            *grad(value, inputs, slopes[1], create_graph=True),
        ]
        directions = drawn(*(tensor.shape for tensor in firsts), seed=2)
        found.append(grad((*firsts, value), (*slopes[:2], *inputs), (*directions, slopes[2])))
    assert_same(*found)


@pytest.mark.parametrize("some", [[5], [0], [2, 3], range(6)], ids=str)
def test_a_network_after_a_pass_that_failed(some: list[int]) -> None:
    """Directions for some of its gradients; what the failed pass left is not counted again."""
    found, failing = [], [False]

    def fail(slope: Tensor) -> Tensor:
        if failing[0]:
            raise MemoryError
        return slope

    for recorded in (False, True):
        (inputs,), params = drawn(SHAPE), drawn((6, 5), (6,), (6,), (6,), (2, 6), (2,))
        with accelerated(second_order="forward") if recorded else nullcontext():
            middle = gelu(functional.linear(inputs, *params[:2]))
            middle.register_hook(fail)
            total = (
                functional.linear(layer_norm(middle, (6,), params[2], params[3]), *params[4:])
                .softmax(-1)[..., 0]
                .sum()
            )
        first = [grad(total, params, create_graph=True)[place] for place in some]
        directions = drawn(*(tensor.shape for tensor in first), seed=2)
        failing[0] = True
        with pytest.raises(MemoryError):
            grad(first, params, directions, retain_graph=True)
        failing[0] = False
        found.append((*grad(total, params, retain_graph=True), *grad(first, params, directions)))
    assert_same(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_returns_may_be_overwritten(name: str) -> None:
    """As an activation in place does it."""
    layer, shapes = LAYERS[name]
    with accelerated(second_order="forward"):
        found = twice(lambda *inputs: layer(*inputs).sigmoid_(), drawn(*shapes))
    expected = twice(lambda *inputs: layer(*inputs).sigmoid(), drawn(*shapes))
    assert_same(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own forward mode
def test_transforms_of_the_model_itself_are_left_alone() -> None:
    """Forward mode and stacks of models."""
    x, tangent = (tensor.detach() for tensor in drawn(SHAPE, SHAPE))
    expected = jvp(gelu, (x,), (tangent,))[1], vmap(silu)(x)
    with accelerated(second_order="forward"):
        assert_same((jvp(gelu, (x,), (tangent,))[1], vmap(silu)(x)), expected)


class Slope(nn.Module):
    """A network whose outputs are its own derivatives by its inputs."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        """Values and the first features' slopes."""
        inputs = inputs.detach().requires_grad_()
        found: Tensor = self.body(inputs)
        return found + grad(found.square().sum(), inputs, create_graph=True)[0][:, :3]


@pytest.mark.parametrize("curvature", [backtrail.Hessian(), backtrail.GaussNewton()], ids=repr)
@pytest.mark.parametrize("build", [lambda: Slope().body, Slope], ids=["network", "its slope"])
def test_products(
    build: Callable[[], nn.Module],
    curvature: backtrail.Hessian | backtrail.GaussNewton,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step's gradient, curvature products and scores are the same with and without."""
    at, found = problem(build), []
    weights = torch.ones(4, dtype=torch.float64)
    a = {name: torch.randn_like(tensor) for name, tensor in at.params.items()}
    for large in (1, 10**9):
        monkeypatch.setattr(second_order, "MIN_ENTRIES", large)
        linearised = curvature.gradient_vjp(at.micro_batch, at.params, at.buffers, weights=weights)
        second, _, scores = linearised.vjp(a, {})
        found.append((*linearised.gradient.values(), *second.values(), scores))
    assert_same(*found)
