"""Multiplies matrices by oneDNN where torch's own choice is slower.

On a CPU, torch multiplies float32 matrices by MKL, which on AMD processors uses half of the width
of AVX-512. oneDNN, which torch ships as well, uses all of it and is about twice as fast at the
sizes of a small GPT.

This is for derivatives and embeddings. The states that a sweep recomputes are left to training's
own kernels, so that they are those of the training to the last bit.
"""

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from warnings import catch_warnings

import torch
from torch import Tensor
from torch.library import Library
from torch.types import Number

from backtrail.accel.switch import enabled

# Multiplications of a product from which on the detour through Python pays.
MIN_MULTIPLICATIONS = 2**21
VENDOR = "AuthenticAMD"  # as /proc/cpuinfo spells it

_in_block: ContextVar[bool] = ContextVar("in_block", default=False)  # of this thread
_lock = threading.Lock()
_blocks = 0  # `registered` blocks that are running, in all threads
_library: Library | None = None  # holds the kernels while there are any
_has_warned = False


@contextmanager
def fast_products() -> Iterator[None]:
    """While the block runs, this thread's large products of float32 matrices go to oneDNN.

    Only where `available` says so.
    """
    with registered():
        before = _in_block.set(available())
        try:
            yield
        finally:
            _in_block.reset(before)


@contextmanager
def registered() -> Iterator[None]:
    """Register the kernel around many `fast_products` blocks, at once; no product changes.

    Every product of the process passes through the kernel then, so it decides by thread. And
    torch's table of kernels should not be written to at every step: other threads compute.
    """
    if not available():
        yield
        return
    _register()
    try:
        yield
    finally:
        _unregister()


def available() -> bool:
    """Whether products go to oneDNN in a block: this CPU gains by it, and neither switch is off."""
    return enabled() and bool(torch.backends.mkldnn.enabled) and mkl_is_slow()


@cache
def mkl_is_slow() -> bool:
    """Whether torch's products by MKL leave half of this processor's AVX-512 unused."""
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (has_mkl and has_onednn):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and VENDOR in _processor()


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product `[m, k] x [k, n]` to `[m, n]`, in the place of `aten::mm` on CPUs."""
    if not _is_faster(a, b):
        # The variant with `out` has a kernel of its own; `aten::mm` would come back to here.
        out: Tensor = torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
        return out
    # oneDNN copies its left matrix into rows if it lies in columns. In a sum over many rows, as of
    # a weight's gradient, the transposed product has the smaller matrix there.
    if a.t().is_contiguous() and a.shape[0] > b.shape[1]:
        return _linear(b.t(), a.t(), None).t().contiguous()
    return _linear(a, b, None)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Number = 1, alpha: Number = 1) -> Tensor:
    """Product `[m, k] x [k, n]` plus a bias `[n]` for every row, in the place of `aten::addmm`.

    Factors other than 1 and biases of another shape are left to torch.
    """
    is_linear = (
        beta == 1
        and alpha == 1
        and bias.shape == b.shape[1:]
        and bias.dtype is torch.float32
        and _is_faster(a, b)
    )
    if is_linear:
        return _linear(a, b, bias)
    out = a.new_empty(a.shape[0], b.shape[1])
    found: Tensor = torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
    return found


def _linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Product by oneDNN, which takes it as a linear layer: a @ weight.T + bias."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return found


def _is_faster(a: Tensor, b: Tensor) -> bool:
    if not _in_block.get() or not enabled():
        return False
    if a.dtype is not torch.float32 or b.dtype is not torch.float32:
        return False
    multiplications = a.numel() * b.shape[1]
    return multiplications >= MIN_MULTIPLICATIONS and _is_dense(a) and _is_dense(b)


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _register() -> None:
    global _blocks, _library  # noqa: PLW0603 - the table of kernels is the process's
    with _lock:
        if _library is None:
            _library = _library_of_kernels()
        _blocks += 1


def _library_of_kernels() -> Library:
    global _has_warned  # noqa: PLW0603 - torch warns once in a process
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    # torch warns that its own kernel is replaced, but it is put back. Later calls do not touch the
    # filters, which belong to all threads.
    with nullcontext() if _has_warned else catch_warnings(action="ignore"):
        library.impl("mm", mm, "CPU")  # type: ignore[no-untyped-call]
        library.impl("addmm", addmm, "CPU")  # type: ignore[no-untyped-call]
    _has_warned = True
    return library


def _unregister() -> None:
    global _blocks, _library  # noqa: PLW0603 - the table of kernels is the process's
    with _lock:
        _blocks -= 1
        if _blocks == 0:
            # A library takes its kernels out of the table when nothing refers to it any more.
            _library = None


def _processor() -> str:
    """The processor's description of itself."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
