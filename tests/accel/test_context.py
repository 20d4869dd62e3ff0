"""`accelerated` and its switch: what a block sets, that it restores it, and that off means off."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.accel import allocator, layers, onednn, second_order
from backtrail.accel.allocator import M_TRIM_THRESHOLD, TRIM_THRESHOLD_AFTER, TRIM_THRESHOLD_KEPT
from backtrail.accel.context import accelerated
from backtrail.accel.switch import enabled

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@dataclass
class Uses:
    """What was used of acceleration, in order."""

    products: list[tuple[int, ...]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    allocator: list[tuple[str, int, int]] = field(default_factory=list)

    def mallopt(self, parameter: int, value: int) -> None:
        """As glibc's."""
        self.allocator.append(("mallopt", parameter, value))

    def malloc_trim(self, padding: int) -> None:
        """As glibc's."""
        self.allocator.append(("trim", padding, 0))

    @property
    def threshold(self) -> int | None:
        """The trim threshold as it was last set."""
        found = [value for _, parameter, value in self.allocator if parameter == M_TRIM_THRESHOLD]
        return found[-1] if found else None


@pytest.fixture(autouse=True)
def uses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uses]:
    """As on a processor that gains by everything; nothing is left set after a test."""
    found = Uses()
    real_linear, real_record = onednn._linear, second_order.record

    def linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        found.products.append((*a.shape, b.shape[1]))
        return real_linear(a, b, bias)

    def record(layer: Any, *inputs: Tensor) -> Tensor:
        found.layers.append(type(layer).__name__)
        return real_record(layer, *inputs)

    monkeypatch.setattr(onednn, "_linear", linear)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(layers, "record", record)
    monkeypatch.setattr(second_order, "MIN_ENTRIES", 1)
    monkeypatch.setattr(allocator, "_glibc", lambda: found)
    monkeypatch.setattr(allocator, "_free_bytes", lambda _: float("inf"))
    yield found
    assert not is_registered()
    assert found.threshold in {None, TRIM_THRESHOLD_AFTER}


def is_registered() -> bool:
    """Whether torch's table of kernels has ours."""
    return "aten/mm/CPU" in torch.library._impls


def product() -> Tensor:
    """A large one."""
    return torch.ones(256, 128) @ torch.ones(128, 256)


def activation() -> Tensor:
    """A smooth layer."""
    return gelu(torch.ones(4, 4))


def accelerated_fully() -> Any:
    """All that a block can turn on for a forward pass."""
    return accelerated(second_order="forward", keep_memory=True)


def test_a_block_turns_on_what_it_is_asked_for(uses: Uses) -> None:
    """And nothing that computes in a block around others."""
    with accelerated(products=False, keep_memory=True):
        assert is_registered()
        assert uses.threshold == TRIM_THRESHOLD_KEPT
        product()
        activation()
        assert not (uses.products or uses.layers)
        with accelerated(second_order="forward"):
            product()
            activation()
    assert (len(uses.products), uses.layers) == (1, ["_Elementwise"])
    with accelerated():
        activation()
    assert len(uses.layers) == 1


def test_everything_is_restored_after_an_exception(uses: Uses) -> None:
    """The fixture checks what is the process's; products and layers are torch's again, too."""
    with pytest.raises(MemoryError), accelerated_fully(), accelerated_fully():
        raise MemoryError
    product()
    activation()
    assert not (uses.products or uses.layers)


def test_blocks_may_be_nested(uses: Uses) -> None:
    """The outermost sets and restores; an inner one that ends takes nothing away from it."""
    with accelerated_fully():
        with accelerated_fully():
            pass
        assert uses.threshold == TRIM_THRESHOLD_KEPT
        assert is_registered()
        product()
        activation()
    assert (len(uses.products), len(uses.layers)) == (1, 1)
    assert [call[0] for call in uses.allocator] == ["mallopt", "mallopt", "mallopt", "trim"]


def test_two_threads_may_be_inside_at_once(uses: Uses) -> None:
    """The first to enter leaves first; what it set for the process lasts until the other leaves."""
    entered, left, inside = Event(), Event(), Event()

    def first() -> None:
        with accelerated_fully():
            entered.set()
            inside.wait(60)
        left.set()

    other = Thread(target=first)
    other.start()
    assert entered.wait(60)
    product()  # this thread is in no block
    assert uses.products == []
    with accelerated_fully():
        inside.set()
        assert left.wait(60)
        other.join()
        assert uses.threshold == TRIM_THRESHOLD_KEPT
        assert is_registered()
        product()
        activation()
    assert (len(uses.products), len(uses.layers)) == (1, 1)


def test_free_memory_is_returned_unless_it_is_kept(uses: Uses) -> None:
    """`trim` is for passes that must fit beside a training."""
    allocator.trim()
    with accelerated(keep_memory=True):
        allocator.trim()
    with backtrail.acceleration(False):
        allocator.trim()
    trims = [call for call in uses.allocator if call[0] == "trim"]
    assert len(trims) == 2  # the first, and the one at the end of the block


def test_a_tuned_glibc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mallopt would overrule the user's own thresholds for good."""
    monkeypatch.undo()
    assert allocator._glibc.__wrapped__() is not None or sys.platform != "linux"
    for name, value in (
        ("MALLOC_TRIM_THRESHOLD_", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.top_pad=1"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert allocator._glibc.__wrapped__() is None


def test_a_setting_holds_until_the_end_of_its_block() -> None:
    """As torch.set_grad_enabled: a plain call holds until the next, a block restores."""
    assert enabled()
    with pytest.raises(MemoryError), backtrail.acceleration(False):
        assert not enabled()
        with backtrail.acceleration(True):
            assert enabled()
        assert not enabled()
        raise MemoryError
    assert enabled()
    backtrail.acceleration(False)
    try:
        assert not enabled()
    finally:
        backtrail.acceleration(True)
    assert enabled()


def test_a_setting_is_its_threads_own() -> None:
    """Two threads in blocks of their own, which end in the order in which they began."""
    found = []
    with backtrail.acceleration(False):
        other = Thread(target=lambda: found.append(enabled()))
        other.start()
        other.join()
    assert found == [True]


def off_inside_a_block() -> None:
    """The switch is turned off where everything is on."""
    with accelerated_fully(), backtrail.acceleration(False):
        product()
        activation()
        with accelerated_fully():
            product()
            activation()


def off_around_blocks() -> None:
    """The switch is off before anything begins."""
    with backtrail.acceleration(False), accelerated_fully(), accelerated(second_order="gradient"):
        assert not is_registered()
        assert torch.overrides._get_current_function_mode() is None
        product()
        activation()


@pytest.mark.parametrize("work", [off_inside_a_block, off_around_blocks])
def test_off_is_off(work: Callable[[], None], uses: Uses) -> None:
    """No product and no layer takes another way than torch's own."""
    work()
    assert not (uses.products or uses.layers)
    if work is off_around_blocks:
        assert uses.allocator == []


def attribution(folder: Path) -> Any:
    """Recorded and attributed, with wide layers of the kinds that can be accelerated."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(256, 64), torch.randint(0, 8, (256,)))
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 8))
    task = backtrail.classification(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for x, y in recorder.watch(DataLoader(data, batch_size=256)):
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    run, queries = backtrail.open_run(folder, task), backtrail.Loss(data, samples=[0, 1])
    methods = [backtrail.DIT(), backtrail.DIT(curvature=backtrail.GaussNewton("difference"))]
    methods += [backtrail.TracIn(), backtrail.DataValueEmbedding(rank=4)]  # type: ignore[list-item]
    return [method.attribute(run, queries).values() for method in methods]


def test_with_the_switch_off_a_whole_attribution_uses_nothing(uses: Uses, tmp_path: Path) -> None:
    """From the recording on; with it on, everything is used, and the numbers are the same."""
    with backtrail.acceleration(False):
        off = attribution(tmp_path / "off")
        assert not onednn.available()
    assert (uses.products, uses.layers, uses.allocator) == ([], [], [])
    assert torch.overrides._get_current_function_mode() is None
    on = attribution(tmp_path / "on")
    assert onednn.available()
    assert set(uses.layers) == {"_Norm", "_Elementwise"}
    assert uses.products
    assert uses.threshold == TRIM_THRESHOLD_AFTER
    for one, other in zip(off, on, strict=True):
        assert abs(one - other).max() < 1e-3 * abs(one).max()


@pytest.mark.parametrize("value", ["0", "off", "1", None])
def test_the_environment_variable(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds for every thread of a process from its start; a call may overrule it."""
    code = (
        "import threading, backtrail; from backtrail.accel.switch import enabled;"
        "found = [enabled()]; other = threading.Thread(target=lambda: found.append(enabled()));"
        "other.start(); other.join(); backtrail.acceleration(True);"
        "print(*found, enabled())"
    )
    if value is None:
        monkeypatch.delenv("BACKTRAIL_ACCEL", raising=False)
    else:
        monkeypatch.setenv("BACKTRAIL_ACCEL", value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = value in {None, "1"}
    assert done.stdout.split() == [str(expected), str(expected), "True"]
