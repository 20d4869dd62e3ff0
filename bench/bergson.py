"""Beside bergson (MAGIC) and dattri-llm on a small GPT-2.

PYTHONPATH=src .venv-bench/bin/python -m bench.bergson [rounds [threads]]

One training, 32 steps of 16 documents of 64 words, AdamW, float32, the output layer not tied to the
embedding; every library trains it itself, from the same weights in the same order. Times are the
least of the rounds, which go through all of them in turn, in units of the plain loop. bergson's are
those of its trainer's `train` and `backward` alone, without what its command does around them. Then
a small network in float64, untied and tied, against central differences.
"""

import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch.utils.data import TensorDataset
from transformers.utils import logging as transformers_logging

import backtrail
from backtrail.stats import pearson, spearman
from bench.language import adamw_influence, derivatives, magic
from bench.language.case import FULL, Case, distance, plain, record, timed

COUNTS = (1, 8)
POLICIES = {
    f"backtrail, {type(policy).__name__}, {product}": backtrail.DIT(curvature=policy)
    for product in ("autograd", "difference")
    for policy in (backtrail.Hessian(product=product), backtrail.GaussNewton(product=product))
}
BERGSON, DATTRI = "bergson, MAGIC", "dattri-llm, AdamW influence"
EXACT = next(iter(POLICIES))
BARS = {
    (EXACT, 1): 1.0,
    (EXACT, 8): 2.0,
    ("backtrail, GaussNewton, autograd", 8): 2.8,
}  # times faster than bergson
TRAINING = 0  # in place of a number of queries: the library's own training


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured so far.

    Attributes:
        times: seconds of every round by library and number of queries.
        influences: by library, `[query, document]`, in backtrail's sign.
        apart: how far bergson's trained weights are from the loop's, as a share of the way they
            went.
    """

    case: Case
    folder: Path
    times: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    influences: dict[str, np.ndarray] = field(default_factory=dict)
    apart: list[float] = field(default_factory=list)

    def note(self, name: str, count: int, spent: float) -> None:
        """Keep one more time."""
        self.times.setdefault((name, count), []).append(spent)

    def unit(self, name: str, count: int) -> float:
        """Least time, in units of the plain loop."""
        return min(self.times[name, count]) / min(self.times["plain", TRAINING])

    def queries(self, count: int) -> TensorDataset:
        """The first documents of those to ask about."""
        return TensorDataset(*self.case.held_out(max(COUNTS))[:count])

    def round(self, number: int) -> None:
        """Measure everything once more."""
        spent, task = plain(self.case)
        self.note("plain", TRAINING, spent)
        self.ask_backtrail(self.folder / f"backtrail{number}")
        for count in COUNTS:
            self.ask_bergson(count, self.folder / f"bergson{number}-{count}", task)
            self.ask_dattri(count, self.folder / f"dattri{number}-{count}")

    def ask_backtrail(self, folder: Path) -> None:
        """One recorded training answers all."""
        recording, run = record(self.case, folder)
        for name, dit in POLICIES.items():
            self.note(name, TRAINING, recording)
            for count in COUNTS:
                queries = backtrail.Loss(self.queries(count))
                spent, found = timed(partial(dit.attribute, run, queries))
                self.note(name, count, spent)
                self.influences[name] = found.total()[:, 0]

    def ask_bergson(self, count: int, folder: Path, task: backtrail.Task) -> None:
        """One backward pass for every query."""
        answer = magic.attribute(self.case, folder, self.queries(count))
        self.note(BERGSON, TRAINING, answer.forward)
        self.note(BERGSON, count, sum(answer.backward))
        self.note("its whole command", count, answer.whole)
        self.influences[BERGSON] = -answer.scores
        self.apart.append(distance(self.case, answer.trained, task.model))

    def ask_dattri(self, count: int, folder: Path) -> None:
        """One sweep over stored gradients."""
        answer = adamw_influence.attribute(self.case, folder, self.queries(count))
        self.note(DATTRI, TRAINING, answer.forward)
        self.note(DATTRI, count, answer.scoring)
        self.influences[DATTRI] = -answer.scores

    def table(self) -> str:
        """Times of all, and how well each agrees with the exact influence."""
        lines = [
            "| | own training | 1 query | 8 queries | Pearson, least of 8 | Spearman, mean |",
            "|---|---|---|---|---|---|",
        ]
        for name, found in self.influences.items():
            cells = [f"{self.unit(name, count):.2f}" for count in (TRAINING, *COUNTS)]
            alike, ranked = (
                pearson(found, self.influences[EXACT]),
                spearman(found, self.influences[EXACT]),
            )
            lines.append(
                "| "
                + " | ".join([name, *cells, f"{alike.min():.6f}", f"{ranked.mean():.3f}"])
                + " |"
            )
        return "\n".join(lines)

    def faster(self, name: str, count: int) -> tuple[float, float]:
        """How many times faster than bergson: with everyone's own training, and without."""
        theirs, ours = self.unit(BERGSON, count), self.unit(name, count)
        return (theirs + self.unit(BERGSON, TRAINING)) / (
            ours + self.unit(name, TRAINING)
        ), theirs / ours

    def against(self) -> str:
        """The same as a table."""
        head = (
            "| bergson ÷ | 1 query, with training | without | 8 queries, with training | without |"
        )
        lines = [head, "|---|---|---|---|---|"]
        for name in (*POLICIES, DATTRI):
            cells = [f"{ratio:.2f}" for count in COUNTS for ratio in self.faster(name, count)]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(lines)

    def bars(self) -> str:
        """What must hold, with everyone's own training."""
        found = [
            (f"{name}, {count}", self.faster(name, count)[0], bar)
            for (name, count), bar in BARS.items()
        ]
        found.append(
            (
                "Pearson with bergson",
                float(pearson(self.influences[EXACT], self.influences[BERGSON]).min()),
                0.999,
            )
        )
        return "\n".join(
            f"{'held' if at >= bar else 'MISSED'}: {name}: {at:.3f}, bar {bar}"
            for name, at, bar in found
        )

    def aside(self) -> str:
        """What bergson's command costs as typed, and how close its training is to the loop."""
        whole = " and ".join(f"{self.unit('its whole command', count):.1f}" for count in COUNTS)
        return (
            f"bergson's whole command: {whole}; its weights: {max(self.apart):.0e} of the way from "
            "the loop's"
        )


def checked(folder: Path) -> str:
    """Whose scores are derivatives."""
    lines = [
        "| float64, against central differences | backtrail | bergson | bergson, by document |",
        "|---|---|---|---|",
    ]
    for name, tied in (("untied", False), ("tied", True)):
        ours, theirs = derivatives.errors(folder / name, tied=tied)
        span = f"{theirs.shares.min():.1e} to {theirs.shares.max():.1e}"
        lines.append(f"| {name} | {ours.overall:.1e} | {theirs.overall:.1e} | {span} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rounds, threads = (int(sys.argv[place]) if len(sys.argv) > place else 2 for place in (1, 2))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Case(FULL), Path(folder))
        for number in range(rounds):
            bench.round(number)
        names = ("bergson", "dattri-llm", "torch", "torchopt", "transformers")
        print(
            f"backtrail {backtrail.__version__}, "
            + ", ".join(f"{name} {version(name)}" for name in names)
        )
        seconds = min(bench.times["plain", TRAINING])
        print(f"{rounds} rounds, {threads} threads; plain loop {seconds:.2f} s\n")
        print(bench.table() + "\n\n" + bench.against() + "\n\n" + bench.bars())
        print("\n" + bench.aside() + "\n\n" + checked(Path(folder)), flush=True)


if __name__ == "__main__":
    main()
