"""Where the command line's tests find a recorded training and its influence."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AttributedRun:
    """Paths of a recorded training and its influence, as a user would type them."""

    folder: Path

    @property
    def run(self) -> str:
        """The run's folder."""
        return str(self.folder / "run")

    @property
    def influence(self) -> str:
        """The influence's folder."""
        return str(self.folder / "influence")

    def at(self, name: str) -> str:
        """A name in the task file."""
        return f"{self.folder / 'my_file.py'}:{name}"

    @property
    def references(self) -> tuple[str, ...]:
        """The flags that name the task and the queries."""
        return "--task", self.at("task"), "--queries", self.at("queries")
