"""A row of the papers' tables: figures of each seed, kept in files, and their mean and interval."""

import datetime
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.papers.seeds import Figures, half_width

RESULTS = Path(__file__).parents[1] / "results" / "papers"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: like "A1"; also of its file.
        about: the set-up in a few words.
        measure: the figures of one seed.
        seeds: how many seeds.
        published: what the paper says, by figure.
        bars: what must hold, by figure, in words.
        drawn: whether its many figures are a picture, and no lines of the table.
    """

    name: str
    about: str
    measure: Callable[[int], Figures]
    seeds: int = 5
    published: Mapping[str, str] = field(default_factory=dict)
    bars: Mapping[str, str] = field(default_factory=dict)
    drawn: bool = False

    @property
    def path(self) -> Path:
        """Where its figures are kept."""
        return RESULTS / f"{self.name}.json"

    def kept(self) -> dict[str, dict[str, float]]:
        """Figures by seed."""
        found: dict[str, dict[str, float]] = (
            json.loads(self.path.read_text())["seeds"] if self.path.exists() else {}
        )
        return found

    def fill(self, seeds: int) -> None:
        """Measure the seeds that are not there yet, each kept as soon as it is known."""
        for seed in range(seeds):
            kept = self.kept()
            if str(seed) in kept:
                continue
            begun, worked = time.perf_counter(), time.process_time()
            figures = {name: float(value) for name, value in self.measure(seed).items()}
            kept[str(seed)] = figures | {
                "processor seconds": round(time.process_time() - worked, 1)
            }
            self._write(kept)
            print(f"{self.name}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)

    def _write(self, seeds: dict[str, dict[str, float]]) -> None:
        told = {
            "about": self.about,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "seeds": seeds,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(told, indent=1) + "\n")
        scratch.replace(self.path)

    def lines(self) -> list[str]:
        """The row as lines of a Markdown table, one a figure: figure, paper, bar, here, seeds."""
        kept = list(self.kept().values())
        if not kept:
            return []
        cost = np.mean([figures["processor seconds"] for figures in kept])
        about = f"**{self.name}** {self.about} ({cost:.0f} s a seed)"
        if self.drawn:
            return [f"| {about} | see the plot | | | | {len(kept)} |"]
        lines = []
        for place, name in enumerate(name for name in kept[0] if name != "processor seconds"):
            label = about if place == 0 else ""
            values = np.array([figures[name] for figures in kept])
            cells = (
                name,
                self.published.get(name, ""),
                self.bars.get(name, ""),
                told(values),
                len(values),
            )
            lines.append(f"| {label} | " + " | ".join(map(str, cells)) + " |")
        return lines


def told(values: np.ndarray) -> str:
    """Mean and its 95 % t interval over seeds, and the median."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return "none"
    mean = known.mean()
    if len(known) == 1:
        return f"{mean:.3g}"
    half = half_width(known)
    if abs(mean) < 1e-3 and mean != 0:
        return f"{mean:.1e}, at most {known.max():.1e}"
    return f"{mean:.3f} ± {half:.3f}, median {np.median(known):.3f}"


def commit() -> str:
    """The commit that is measured."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
