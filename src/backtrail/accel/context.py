"""The one context in which derivatives are computed faster."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from backtrail.accel.allocator import memory_kept
from backtrail.accel.layers import DoubleBackwardMode
from backtrail.accel.onednn import fast_products, registered
from backtrail.accel.second_order import cotangents_only
from backtrail.accel.switch import enabled

SecondOrder = Literal["forward", "gradient"]


@contextmanager
def accelerated(
    *,
    products: bool = True,
    second_order: SecondOrder | None = None,
    keep_memory: bool = False,
) -> Iterator[None]:
    """Compute derivatives faster while the block runs; they agree with torch's own to rounding.

    Blocks may be nested, and several threads may be inside at once: what is set for the whole
    process (the registered kernel, the allocator's thresholds) is set by the first block that
    needs it and restored when the last one ends, also after an exception. With the switch off
    (`backtrail.acceleration(False)`), the block does nothing.

    Recomputed states of a training must stay outside, so that they are those of the training to
    the last bit.

    Args:
        products: This thread's large products of float32 matrices go to oneDNN, where that is
            faster. False is for a block around many others: the kernel is registered once, and
            no computation changes.
        second_order: "forward" where the block holds a forward pass that is going to be
            differentiated twice: large elementwise and normalising layers are recorded with a
            hand-written double backward. "gradient" where it holds the gradient of such a pass
            that is going to be differentiated by its cotangents alone, as in a Gauss-Newton
            product.
        keep_memory: glibc keeps the memory that the block frees for its next allocations; after
            the block it is returned to the system.
    """
    if not enabled():
        yield
        return
    with ExitStack() as stack:
        if keep_memory:
            stack.enter_context(memory_kept())
        stack.enter_context(fast_products() if products else registered())
        if second_order == "forward":
            stack.enter_context(DoubleBackwardMode())
        elif second_order == "gradient":
            stack.enter_context(cotangents_only())
        yield
