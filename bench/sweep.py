"""What a sweep and a recording cost, in units of plain training: python -m bench.sweep.

An 818 k-parameter GPT, states in memory, against a plain loop over the same batches in the same process.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import whence
from bench.models import GPT, sentences

STEPS, SLOTS, REPEATS = 4, 32, 3


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def loop(path: Path | None) -> None:
    """Train from a fixed start, with a recorder if there is a path."""
    torch.manual_seed(0)
    model, data = GPT(), sentences(STEPS * SLOTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(data, batch_size=SLOTS, shuffle=True)
    if path is None:
        run_epoch(model, optimizer, loader)
        return
    with whence.Recorder(path, task_of(model, data), optimizer) as recorder:
        run_epoch(model, optimizer, recorder.watch(loader))


def run_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: object) -> None:
    """The loop as users write it."""
    for tokens, targets in batches:
        cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def task_of(model: torch.nn.Module, data: object) -> whence.Task:
    """The loop as whence is told of it."""
    return whence.language_model(model, data)


def main() -> None:
    """Print the table."""
    folder = Path(tempfile.mkdtemp())
    loop(None)
    plain, recorded, swept = [], [], {1: [], 16: []}
    for repeat in range(REPEATS):
        plain.append(seconds(lambda: loop(None)))
        path = folder / f"run{repeat}"
        recorded.append(seconds(lambda path=path: loop(path)))
        run = whence.open_run(path, task_of(GPT(), sentences(STEPS * SLOTS)))
        for count, times in swept.items():
            queries = whence.Loss(run.task.data, samples=range(count))
            times.append(seconds(lambda run=run, queries=queries: whence.DIT().attribute(run, queries)))
        print(f"repeat {repeat}: plain {plain[-1]:.2f} s")
    base = statistics.median(plain)
    print(f"recording / plain          {statistics.median(recorded) / base:.3f}")
    one = statistics.median(swept[1]) / base
    print(f"sweep, 1 query / plain     {one:.2f}")
    for count in (16,):
        ratio = statistics.median(swept[count]) / base
        print(f"sweep, {count:2d} queries / plain  {ratio:.2f}   each further query {(ratio - one) / (count - 1):.2f}")


if __name__ == "__main__":
    main()
