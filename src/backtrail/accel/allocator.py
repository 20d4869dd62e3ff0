"""Keeps the memory that a sweep frees at the end of one step for its next step.

glibc returns free memory at the top of the heap to the system as soon as it exceeds a threshold of
at most 64 MiB, and a sweep frees more than that at every step: the system then has to find and
clear the same pages again, which took a fifth of a sweep's time on a CPU. Other allocators and
devices have no such threshold and are left alone, as is a glibc that the user has tuned.
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from backtrail.accel.switch import enabled

# Parameters of mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# Larger blocks are mapped one by one and never lie on the heap. It is the largest threshold that
# glibc accepts, and where its own adaptation ends.
MMAP_THRESHOLD = 32 * 2**20
# Free bytes at the top of the heap above which glibc returns them: while memory is kept, and after.
TRIM_THRESHOLD_KEPT = 2**31 - 1
TRIM_THRESHOLD_AFTER = 2 * MMAP_THRESHOLD  # what glibc's adaptation sets for that MMAP_THRESHOLD
# Who sets one of these has tuned glibc, and mallopt would overrule it for good.
TUNING_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
)

_lock = threading.Lock()
_blocks = 0  # `memory_kept` blocks that are running, in all threads


@contextmanager
def memory_kept() -> Iterator[None]:
    """While the block runs, glibc keeps freed memory; after the last such block it is returned.

    glibc cannot tell its thresholds, nor switch its adaptation on again. So what the block leaves
    is the state in which that adaptation ends once a process has freed a large block.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _begin(libc)
    try:
        yield
    finally:
        _end(libc)


def trim() -> None:
    """Return free memory to the system now, also from holes in the heap, if there is much of it.

    The next allocations often do not fit into those holes. Little memory is not returned, because
    its pages are soon needed again; and none while a block keeps memory.
    """
    libc = _glibc()
    if libc is None or not enabled() or _blocks > 0:
        return
    if _free_bytes(libc) > TRIM_THRESHOLD_AFTER:
        libc.malloc_trim(0)


def _begin(libc: Any) -> None:
    global _blocks  # noqa: PLW0603 - the allocator is the process's
    with _lock:
        if _blocks == 0:
            libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
            libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_KEPT)
        _blocks += 1


def _end(libc: Any) -> None:
    global _blocks  # noqa: PLW0603 - the allocator is the process's
    with _lock:
        _blocks -= 1
        if _blocks == 0:
            libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_AFTER)
            libc.malloc_trim(0)


class _MallocInfo(ctypes.Structure):
    """Struct mallinfo2 of malloc.h: sizes of the heap, of which `fordblks` is free bytes."""

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def _free_bytes(libc: Any) -> float:
    """Free bytes on the heap; infinite where glibc is older than mallinfo2 (2.33)."""
    if not hasattr(libc, "mallinfo2"):
        return math.inf
    libc.mallinfo2.restype = _MallocInfo
    return float(libc.mallinfo2().fordblks)


@cache
def _glibc() -> Any:
    """The C library, if it is a glibc that the user has not tuned; otherwise None."""
    tuned = any(name in os.environ for name in TUNING_VARIABLES)
    if sys.platform != "linux" or tuned or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") else None
