"""Smooth layers recorded for few passes have torch's derivatives: first, second, third, of one query and of many."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as differentiated
from torch.func import jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, layer_norm, mish, scaled_dot_product_attention, silu
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    NewGELUActivation,
    QuickGELUActivation,
)

import whence
from tests.replay.test_curvature import problem
from whence.activations import join
from whence.replay import linear
from whence.replay import twice as layers
from whence.replay.smooth import Smooth
from whence.replay.twice import straight

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
QKV = (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)  # [sample, head, token, width]
BLIND = torch.tensor([[1, 0, 1, 1, 0, 1], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]], dtype=torch.bool)  # one sees nothing
BIASED = torch.linspace(-2, 2, 3 * 4 * 6, dtype=torch.float64).view(3, 4, 6)
attend = scaled_dot_product_attention
TARGETS = torch.tensor([1, 0, -100, 4])
LAYERS |= {
    "softmax": (lambda x: functional.softmax(x, -1, dtype=torch.float64), (SHAPE,)),
    "softmax of rows": (lambda x: x.softmax(1), (SHAPE,)),
    "softmax of columns": (lambda x: torch.softmax(x, dim=0), (SHAPE,)),
    "log_softmax": (lambda x: functional.log_softmax(x, dim=-1), (SHAPE,)),
    "log_softmax of rows": (lambda x: x.log_softmax(1), (SHAPE,)),
    "cross entropy": (lambda x: functional.cross_entropy(x, TARGETS, reduction="none"), ((4, 5),)),
    "cross entropy, mean": (lambda x: functional.cross_entropy(x, TARGETS), ((4, 5),)),
    "cross entropy of tokens": (lambda x: functional.cross_entropy(x, TARGETS[None, :3].expand(4, 3)), ((4, 5, 3),)),
    "cross entropy of one": (lambda x: functional.cross_entropy(x, TARGETS[0]), ((5,),)),
    "cross entropy, weighted": (
        lambda x: functional.cross_entropy(x, TARGETS % 5, torch.arange(1, 6).to(x), ignore_index=4),
        ((4, 5),),
    ),
    "cross entropy, smoothed": (lambda x: functional.cross_entropy(x, TARGETS, label_smoothing=0.1), ((4, 5),)),
    "cross entropy with shares": (lambda x: functional.cross_entropy(x, x.detach().softmax(1)), ((4, 5),)),
    "linear": (functional.linear, (SHAPE, (6, 5), (6,))),
    "linear without a bias": (functional.linear, (SHAPE, (6, 5))),
    "linear of a still input": (lambda w, b: functional.linear(torch.ones(SHAPE).to(w), w, b), ((6, 5), (6,))),
    "linear of a still weight": (lambda x, b: functional.linear(x, torch.ones(6, 5).to(x), b), (SHAPE, (6,))),
    "linear of a still bias": (lambda x, w: functional.linear(x, w, torch.ones(6).to(x)), (SHAPE, (6, 5))),
    "linear, its bias alone": (lambda b: functional.linear(torch.ones(4, 5).to(b), torch.ones(6, 5).to(b), b), ((6,),)),
    "by columns": (torch.addmm, ((6,), (4, 5), (5, 6))),
    "by columns, scaled": (partial(torch.addmm, beta=2), ((6,), (4, 5), (5, 6))),
    "attention": (attend, QKV),
    "attention, causal": (partial(attend, is_causal=True), QKV),
    "attention, scaled": (partial(attend, scale=0.3), QKV),
    "attention, masked": (partial(attend, attn_mask=BLIND), QKV),
    "attention, biased": (partial(attend, attn_mask=BIASED), QKV),
    "attention of one head": (attend, ((4, 5), (6, 5), (6, 7))),
    "attention, grouped": (partial(attend, enable_gqa=True), ((2, 4, 4, 5), (2, 2, 6, 5), (2, 2, 6, 7))),
}
for composed in (NewGELUActivation, FastGELUActivation, QuickGELUActivation, AccurateGELUActivation):
    join(activation := composed())
    LAYERS[composed.__name__] = (activation, (SHAPE,))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small layers count as large, and torch's own attention can be differentiated twice."""
    for kind in (layers, linear):
        monkeypatch.setattr(kind, "LARGE", 1)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> Leaves:
    """Random tensors, to be differentiated by."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes)


def twice(layer: Layer, inputs: Leaves, *, third: bool = False) -> tuple[Leaves, Leaves, Leaves]:
    """The gradient of a layer, and derivatives by slope and inputs of its product with a direction."""
    value = layer(*inputs)
    (slope,) = drawn(value.shape, seed=1)
    first = grad(value, inputs, slope, create_graph=True)
    directions = drawn(*(tensor.shape for tensor in first), seed=2)
    return first, grad(first, (slope, *inputs), directions, retain_graph=True, create_graph=third), (slope, *directions)


def both(name: str) -> Iterator[tuple[Tensor, Leaves]]:
    """A layer's value and its inputs, as torch has it and then recorded."""
    layer, shapes = LAYERS[name]
    for recorded in (False, True):
        inputs = drawn(*shapes)
        with Smooth() if recorded else nullcontext():
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
    with Smooth():
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
            with Smooth():
                _, second, others = twice(layer, inputs, third=True)
        else:
            _, second, others = twice(layer, inputs, third=True)
        total = torch.stack([tensor.square().sum() for tensor in second]).sum()
        thirds.append(grad(total, (*inputs, *others)))
    assert_same(*thirds)


@pytest.mark.parametrize("name", LAYERS)
def test_directions_at_once(name: str) -> None:
    """A stack of directions, and the gradient as a function of its slope alone."""
    found = []
    for value, inputs in both(name):
        (slope,) = drawn(value.shape, seed=1)
        with straight():
            bent = grad(value, inputs, slope, create_graph=True, retain_graph=True)
        first = grad(value, inputs, slope, create_graph=True)
        many = drawn(*((2, *tensor.shape) for tensor in first), seed=2)
        pulled = vmap(lambda *a, first=first, at=(slope, *inputs): grad(first, at, a, retain_graph=True))(*many)
        pushed = vmap(lambda *a, bent=bent, slope=slope: grad(bent, slope, a, retain_graph=True))(*many)
        found.append((*pulled, *pushed))
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
            pulled += vmap(lambda a, one=one, at=(slope, *inputs): grad(one, at, a, retain_graph=True))(many)
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
        with Smooth() if recorded else nullcontext():
            middle = gelu(functional.linear(inputs, *params[:2]))
            middle.register_hook(fail)
            total = (
                functional.linear(layer_norm(middle, (6,), params[2], params[3]), *params[4:]).softmax(-1)[..., 0].sum()
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
    with Smooth():
        found = twice(lambda *inputs: layer(*inputs).sigmoid_(), drawn(*shapes))
    expected = twice(lambda *inputs: layer(*inputs).sigmoid(), drawn(*shapes))
    assert_same(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own forward mode
def test_transforms_of_the_model_itself_are_left_alone() -> None:
    """Forward mode and stacks of models."""
    x, tangent = (tensor.detach() for tensor in drawn(SHAPE, SHAPE))
    expected = jvp(gelu, (x,), (tangent,))[1], vmap(silu)(x)
    with Smooth():
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


@pytest.mark.parametrize("curvature", [whence.Hessian(), whence.GaussNewton()], ids=repr)
@pytest.mark.parametrize("build", [lambda: Slope().body, Slope], ids=["network", "its slope"])
def test_products(
    build: Callable[[], nn.Module], curvature: whence.Hessian | whence.GaussNewton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's gradient, curvature products and scores are the same with and without."""
    at, found = problem(build), []
    weights = torch.ones(4, dtype=torch.float64)
    a = {name: torch.randn_like(tensor) for name, tensor in at.params.items()}
    for large in (1, 10**9):
        for kind in (layers, linear):
            monkeypatch.setattr(kind, "LARGE", large)
        linearised = curvature.linearise(at.piece, at.params, at.buffers, weights=weights)
        second, _, scores = linearised.pull(a, {})
        found.append((*linearised.gradient.values(), *second.values(), scores))
    assert_same(*found)
