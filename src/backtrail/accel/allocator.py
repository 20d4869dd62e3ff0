"""Keeps the memory that a sweep frees at the end of a step for its next step.

glibc hands free memory at the top of the heap back to the system as soon as it passes 64 MiB, and a
sweep frees more than that at every step: the system then has to find and clear the same pages
again, which took a fifth of a sweep's time on a processor. Other allocators and devices have no
such limit, and are left alone.
"""

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 * 2**20  # blocks above this never lie on the heap
_roomy: ContextVar[bool] = ContextVar("roomy", default=False)
KEPT, RETURNED = 2**31 - 1, 2 * LARGEST  # bytes; the latter is where glibc's own adaptation ends


@contextmanager
def keep_heap() -> Iterator[None]:
    """While the block runs, glibc keeps free memory; afterwards it is handed back."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, RETURNED)
        libc.malloc_trim(0)


@contextmanager
def no_trim() -> Iterator[None]:
    """While the block runs, nothing is handed back: the system would have to clear the same pages again and again."""
    before = _roomy.set(True)
    try:
        yield
    finally:
        _roomy.reset(before)


def trim() -> None:
    """Give much free memory back now, holes in the heap too, which the next allocations would often not fit into.

    The pages of a little are sooner needed again than missed.
    """
    libc = _glibc()
    if libc is not None and not _roomy.get() and _free(libc) > RETURNED:
        libc.malloc_trim(0)


_COUNTED = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _Usage(ctypes.Structure):
    """What glibc tells of its heap, struct mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _COUNTED)


def _free(libc: ctypes.CDLL) -> float:
    """Free bytes on the heap; where an older glibc does not count them, any."""
    if not hasattr(libc, "mallinfo2"):
        return math.inf
    libc.mallinfo2.restype = _Usage
    return float(libc.mallinfo2().fordblks)


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None
