"""The one switch of all acceleration: the variable BACKTRAIL_ACCEL and `backtrail.acceleration`."""

import os
import threading
from types import TracebackType
from typing import final

from backtrail import arguments

VARIABLE = "BACKTRAIL_ACCEL"
OFF = frozenset({"0", "false", "no", "off"})
# Read once: a variable that changes while the process runs would hold for some threads only.
ENABLED_AT_START = os.environ.get(VARIABLE, "1").strip().lower() not in OFF


@final
class _Switch(threading.local):
    """The setting of each thread, as that of `torch.set_grad_enabled`.

    `threading.local` calls `__init__` in every thread anew.
    """

    def __init__(self) -> None:
        self.enabled = ENABLED_AT_START


_switch = _Switch()


@final
class acceleration:
    """Turn acceleration on or off in this thread, for good or for the length of a block.

    Works like `torch.set_grad_enabled`: a plain call holds from then on, a `with` block restores
    what was there before. Results with and without agree to rounding. Without, every derivative
    is computed by torch's own kernels, and nothing is changed in the process: no kernel is
    registered, and the memory allocator keeps its settings. The environment variable
    `BACKTRAIL_ACCEL=0` turns it off for all threads of a process from its start.

    Args:
        enabled: Whether derivatives may take the faster ways.

    >>> import backtrail
    >>> with backtrail.acceleration(False):
    ...     pass  # e.g. backtrail.DIT().attribute(run, queries)
    """

    def __init__(self, enabled: bool) -> None:  # noqa: FBT001 - as torch.set_grad_enabled(False)
        enabled = arguments.flag("enabled", enabled)
        self._before = _switch.enabled
        self._enabled = enabled
        _switch.enabled = enabled

    def __enter__(self) -> None:
        """Begin a block."""
        _switch.enabled = self._enabled

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the block with the setting from before the call."""
        _switch.enabled = self._before


def enabled() -> bool:
    """Whether this thread may use acceleration.

    >>> with acceleration(False):
    ...     enabled()
    False
    """
    return _switch.enabled
