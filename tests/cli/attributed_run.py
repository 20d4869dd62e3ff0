"""Paths of the run and the influence that the tests of the command line share."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AttributedRun:
    """Paths of a recorded training and its influence, as a user would type them.

    Attributes:
        folder: Holds the run, the influence and the task file.
    """

    folder: Path

    @property
    def run(self) -> str:
        """The folder of the run."""
        return str(self.folder / "run")

    @property
    def influence(self) -> str:
        """The folder of the influence."""
        return str(self.folder / "influence")

    def at(self, name: str) -> str:
        """Return the reference to a name in the task file."""
        return f"{self.folder / 'my_file.py'}:{name}"

    @property
    def references(self) -> tuple[str, ...]:
        """The flags that give the task and the queries."""
        return "--task", self.at("task"), "--queries", self.at("queries")
