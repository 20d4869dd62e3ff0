"""Products by oneDNN: the same numbers, only in their blocks, and only where they are faster."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.accel import onednn
from backtrail.accel.context import accelerated
from backtrail.accel.onednn import MIN_MULTIPLICATIONS

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch carries no oneDNN"
)

LONG = [(65, 2048, 128), (65, 2047, 128), (7, 4096, 300)]
SHAPES = [
    *LONG,
    (2048, 65, 128),
    (512, 300, 64),
    (1024, 40, 64),
    (300, 1024, 1024),
    (2048, 512, 16),
]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """As on a processor that gains by it; lists the sizes that went there, in no order."""
    taken: list[tuple[int, ...]] = []
    real = onednn._linear

    def noted(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(tuple(sorted((*a.shape, b.shape[1]))))
        return real(a, b, bias)

    monkeypatch.setattr(onednn, "_linear", noted)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    yield taken
    assert onednn._blocks == 0
    assert onednn._library is None


def stored(matrix: Tensor, *, turned: bool) -> Tensor:
    """The same matrix, column by column in memory if turned."""
    return matrix.T.contiguous().T if turned else matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_products_are_those_of_float64(
    shape: tuple[int, int, int], turned: tuple[bool, bool], everywhere: list[tuple[int, ...]]
) -> None:
    """Whatever the order in memory, with and without a bias."""
    rows, inner, columns = shape
    a = stored(torch.randn(rows, inner), turned=turned[0])
    b = stored(torch.randn(inner, columns), turned=turned[1])
    bias = torch.randn(columns)
    exact = a.double() @ b.double()
    with accelerated():
        found, moved = a @ b, torch.addmm(bias, a, b)
    assert everywhere == [tuple(sorted(shape))] * 2
    assert (found - exact).norm() < 1e-6 * exact.norm()
    assert (moved - bias - exact).norm() < 1e-6 * exact.norm()
    assert found.shape == moved.shape == (rows, columns)
    assert found.is_contiguous()  # as torch's own are, and their callers rely on it
    assert moved.is_contiguous()


def test_everything_else_goes_where_it_went(everywhere: list[tuple[int, ...]]) -> None:
    """Small ones, other dtypes, holes in memory, factors, other biases; and all after the block."""
    a, b, bias = torch.randn(256, 128), torch.randn(128, 256), torch.randn(256)
    assert a.numel() * b.shape[1] >= MIN_MULTIPLICATIONS
    cases = {
        "small": lambda: a[:8] @ b,
        "float64": lambda: a.double() @ b.double(),
        "bfloat16": lambda: a.bfloat16() @ b.bfloat16(),
        "expanded": lambda: a[:1].expand(256, 128) @ b,
        "strided": lambda: torch.cat([a, a])[::2] @ b,
        "factors": lambda: torch.addmm(bias, a, b, beta=0.5, alpha=2.0),
        "one bias": lambda: torch.addmm(torch.ones(1), a, b),
        "bias by row": lambda: torch.addmm(
            torch.randn(256, 1, generator=torch.Generator().manual_seed(0)), a, b
        ),
    }
    expected = {name: case() for name, case in cases.items()}
    with accelerated():
        found = {name: case() for name, case in cases.items()}
    after = a @ b
    assert everywhere == []
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    with accelerated(), accelerated():
        pass
    assert torch.equal(a @ b, after)


def test_a_switch_of_torch_is_heeded(
    everywhere: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who turns oneDNN off means all of it."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with accelerated():
        torch.randn(256, 128) @ torch.randn(128, 256)
    assert everywhere == []


def test_gradients_pass_through(everywhere: list[tuple[int, ...]]) -> None:
    """Derivatives of derivatives, too: the kernel lies below them."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 128), torch.randn(512, 256)

    def bent() -> Tensor:
        (slope,) = torch.autograd.grad(
            layer(x).tanh().square().sum(), layer.weight, create_graph=True
        )
        (found,) = torch.autograd.grad(slope.sin().sum(), layer.weight)
        return found

    expected = bent()
    with accelerated():
        found = bent()
    assert len(everywhere) > 3
    assert (found - expected).norm() < 1e-5 * expected.norm()


METHODS: dict[str, tuple[backtrail.DIT | backtrail.DataValueEmbedding, int]] = {
    "Hessian": (backtrail.DIT(), 3),
    "Gauss-Newton": (backtrail.DIT(curvature=backtrail.GaussNewton()), 3),
    "by differences": (backtrail.DIT(curvature=backtrail.Hessian("difference")), 1),
    "embedding": (backtrail.DataValueEmbedding(rank=16), 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_attributions_agree(
    name: str, everywhere: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones, with and without."""
    method, count = METHODS[name]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(512, 64), torch.randint(0, 10, (512,)))
    model = nn.Sequential(
        nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)
    )
    task, optimizer = (
        backtrail.classification(model, data),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    )
    with backtrail.Recorder(tmp_path / "run", task, optimizer) as recorder:
        for x, y in recorder.watch(DataLoader(data, batch_size=256)):
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    run, queries = (
        backtrail.open_run(tmp_path / "run", task),
        backtrail.Loss(data, samples=range(count)),
    )
    fast = method.attribute(run, queries).values()
    assert everywhere
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: False)
    plain = method.attribute(run, queries).values()
    assert np.abs(fast - plain).max() < 1e-3 * np.abs(plain).max()


def test_other_threads_keep_their_kernels(everywhere: list[tuple[int, ...]]) -> None:
    """Whatever they compute meanwhile; and at hand alone changes nothing."""
    a, b, found = torch.randn(256, 128), torch.randn(128, 256), []
    expected = a @ b
    with accelerated(products=False):
        assert torch.equal(a @ b, expected)
        with accelerated():
            other = Thread(target=lambda: found.append(a @ b))
            other.start()
            other.join()
    assert torch.equal(found[0], expected)
    assert everywhere == []
