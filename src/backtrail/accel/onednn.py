"""Multiplies matrices by oneDNN where torch's own choice is slower.

On a processor torch has MKL multiply float32 matrices, which on AMD's processors uses half of the
width of AVX-512. oneDNN, which torch carries too, uses all of it, and is about twice as fast at the
sizes of a small GPT.

This is for derivatives and embeddings. The states that a sweep recomputes are left to the
training's kernels, so that they come out as they were, to the bit.
"""

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from torch.library import Library
from torch.types import Number

LARGE = 2**21  # multiplications from which on a call through Python pays
MAKER = "AuthenticAMD"  # as its processors say
_fast: ContextVar[bool] = ContextVar("fast", default=False)
_lock = threading.Lock()
_entered: list[Library] = []  # the first holds the kernel


@contextmanager
def fast_products() -> Iterator[None]:
    """While the block runs, this thread's large products of float32 matrices take the faster kernel.

    Unless `torch.backends.mkldnn.enabled` says otherwise.
    """
    with installed():
        before = _fast.set(available())
        try:
            yield
        finally:
            _fast.reset(before)


@contextmanager
def installed() -> Iterator[None]:
    """Around many such blocks: torch's table of kernels is not one to write to while other threads compute."""
    if not available():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def available() -> bool:
    """Whether this processor gains by it, and it is not turned off."""
    return bool(torch.backends.mkldnn.enabled) and leaves_half_unused()


@cache
def leaves_half_unused() -> bool:
    """Whether torch's own products do that on this processor."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    found = both and torch.backends.cpu.get_cpu_capability() == "AVX512" and MAKER in _told()
    if found:
        with catch_warnings():  # torch tells once in a process that a kernel is replaced
            simplefilter("ignore")
            _enter()
            _leave()
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product `[m, k] x [k, n]` to `[m, n]`."""
    if _pays(a, b):
        # Its left matrix is laid out row by row first; of a sum over many rows, take the smaller
        # one for that.
        swapped = a.t().is_contiguous() and a.shape[0] > b.shape[1]
        return _linear(b.t(), a.t(), None).t().contiguous() if swapped else _linear(a, b, None)
    found: Tensor = torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return found


def shifted(bias: Tensor, a: Tensor, b: Tensor, *, beta: Number = 1, alpha: Number = 1) -> Tensor:
    """A matrix product, and a bias `[n]` on every row; the like with factors and other biases too."""
    if (
        beta == alpha == 1
        and bias.shape == b.shape[1:]
        and bias.dtype is torch.float32
        and _pays(a, b)
    ):
        return _linear(a, b, bias)
    out = a.new_empty(a.shape[0], b.shape[1])
    found: Tensor = torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
    return found


def _linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """As a linear layer: a @ weight.T + bias."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return found


def _pays(a: Tensor, b: Tensor) -> bool:
    large = a.dtype is b.dtype is torch.float32 and a.numel() * b.shape[1] >= LARGE
    return _fast.get() and large and _is_dense(a) and _is_dense(b)


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _enter() -> None:
    with _lock:
        library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        if not _entered:
            library.impl("mm", product, "CPU")  # type: ignore[no-untyped-call]
            library.impl("addmm", shifted, "CPU")  # type: ignore[no-untyped-call]
        _entered.append(library)


def _leave() -> None:
    with _lock:
        _entered.pop()._destroy()  # type: ignore[no-untyped-call]


def _told() -> str:
    """What the processor says of itself."""
    told = Path("/proc/cpuinfo")
    return told.read_text() if told.exists() else platform.processor()
