"""Names of torch that are replaced for the whole process while somebody needs it."""

import threading
from typing import Any, final


@final
class Replacement:
    """Replaces attributes of a module or class while at least one block in any thread needs it.

    Args:
        owner: the module or class.
        replacements: values by attribute.
    """

    def __init__(self, owner: object, replacements: dict[str, Any]) -> None:
        self._owner = owner
        self._replacements = replacements
        # As they are stored: a class gives its methods bound.
        self.originals: dict[str, Any] = {name: vars(owner)[name] for name in replacements}
        self._lock = threading.Lock()
        self._blocks = 0

    def begin(self) -> None:
        """Replace, if no other block has."""
        with self._lock:
            if self._blocks == 0:
                for name, value in self._replacements.items():
                    setattr(self._owner, name, value)
            self._blocks += 1

    def end(self) -> None:
        """Put the originals back, if no other block needs the replacement."""
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                for name, original in self.originals.items():
                    setattr(self._owner, name, original)
