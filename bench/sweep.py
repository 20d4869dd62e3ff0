"""What recording and a sweep cost, in units of plain training: python -m bench.sweep.

An 818 k-parameter GPT (4 layers, width 128, context 64), AdamW, batches of 32, against a plain loop over the same
batches in the same process. One thread and processor time, because the wall clock of a shared machine says little; the
parts take turns, and the median of the ratios is printed. Every state is kept, so the sweep recomputes none.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import whence
from bench.models import GPT, sentences
from whence.record.policy import CheckpointPolicy

SLOTS, REPEATS = 32, 3
STEPS, RECORDED = 4, 60  # of the run that is swept, and of the one that is recorded with the default policy


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def prepared(steps: int) -> tuple[whence.Task, torch.optim.Optimizer, "DataLoader[Any]"]:
    """A training from a fixed start."""
    torch.manual_seed(0)
    model, data = GPT(), sentences(steps * SLOTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return whence.language_model(model, data), optimizer, DataLoader(data, batch_size=SLOTS, shuffle=True)


def train(task: whence.Task, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> None:
    """The loop as users write it."""
    for tokens, targets in batches:
        cross_entropy(task.model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(steps: int) -> float:
    """Time of the loop alone."""
    task, optimizer, loader = prepared(steps)
    return seconds(lambda: train(task, optimizer, loader))


def record(steps: int, path: Path, policy: CheckpointPolicy | None = None) -> float:
    """Time of the loop with a recorder."""
    task, optimizer, loader = prepared(steps)

    def recorded() -> None:
        with whence.Recorder(path, task, optimizer, checkpoints=policy) as recorder:
            train(task, optimizer, recorder.watch(loader))

    return seconds(recorded)


def swept_run(folder: Path) -> whence.Run:
    """A short run with all states kept."""
    record(STEPS, folder, whence.Every(1))
    return whence.open_run(folder, prepared(STEPS)[0])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    plain(STEPS)
    recording = [record(RECORDED, folder / f"long{r}") / plain(RECORDED) for r in range(REPEATS)]
    print(f"recording / plain            {statistics.median(recording):.3f}   of {sorted(recording)}", flush=True)
    run = swept_run(folder / "short")
    rows = []
    for _ in range(REPEATS):
        unit = plain(STEPS)
        queries = {count: whence.Loss(run.task.data, samples=range(count)) for count in (1, 16)}
        one, many = (seconds(lambda q=q: whence.DIT().attribute(run, q)) / unit for q in queries.values())
        rows.append((one, (many - one) / 15))
    print(f"sweep, 1 query / plain       {statistics.median(row[0] for row in rows):.2f}")
    print(f"each further query of 16     {statistics.median(row[1] for row in rows):.2f}   of {sorted(rows)}")


if __name__ == "__main__":
    main()
