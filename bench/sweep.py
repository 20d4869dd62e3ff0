"""What recording and a sweep cost, in units of plain training: python -m bench.sweep.

An 818 k-parameter GPT (4 layers, width 128, context 64), AdamW, batches of 32, with steps of a
plain loop between those of what is measured. Every state is kept, so the sweep recomputes none.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import backtrail
from backtrail.curvature.policies import Curvature
from backtrail.methods.derivative_check import check_derivatives
from backtrail.record.policy import CheckpointPolicy
from backtrail.sweep import adjoint as reverse
from bench.beats import Beats, after_each
from bench.models import GPT, sentences

SLOTS, QUERIES, BEATS = 32, (1, 16), 4
# Of the run that is swept, and of the one that is recorded with the default policy.
STEPS, RECORDED = 12, 150
POLICIES = {
    "Hessian": backtrail.Hessian(),
    "Gauss-Newton": backtrail.GaussNewton(),
    "Hessian by differences": backtrail.Hessian("difference"),
}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def prepared(steps: int) -> tuple[backtrail.Task, torch.optim.Optimizer, "DataLoader[Any]"]:
    """A training from a fixed start."""
    torch.manual_seed(0)
    model, data = GPT(), sentences(steps * SLOTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return (
        backtrail.language_model(model, data),
        optimizer,
        DataLoader(data, batch_size=SLOTS, shuffle=True),
    )


def train(task: backtrail.Task, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> None:
    """The loop as users write it."""
    for tokens, targets in batches:
        cross_entropy(task.model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def stepping() -> Callable[[], None]:
    """Takes a step of a plain training on ready-made batches, without the time for collating."""
    task, optimizer, loader = prepared(16)
    batches = cycle(list(loader))
    return lambda: train(task, optimizer, [next(batches)])


def plain(steps: int) -> float:
    """Time of the loop alone."""
    task, optimizer, loader = prepared(steps)
    return seconds(lambda: train(task, optimizer, loader))


def record(steps: int, path: Path, policy: CheckpointPolicy | None = None) -> float:
    """Time of the loop with a recorder."""
    task, optimizer, loader = prepared(steps)

    def recorded() -> None:
        with backtrail.Recorder(path, task, optimizer, checkpoints=policy) as recorder:
            train(task, optimizer, recorder.watch(loader))

    return seconds(recorded)


def swept_run(folder: Path, steps: int = STEPS) -> backtrail.Run:
    """A short run with all states kept."""
    record(steps, folder, backtrail.Every(1))
    return backtrail.open_run(folder, prepared(steps)[0])


def swept(run: backtrail.Run, policy: Curvature, count: int) -> float:
    """A sweep for so many queries."""
    queries = backtrail.Loss(run.task.data, samples=range(count))
    beats = Beats(stepping(), clock=time.perf_counter, each=BEATS)
    with after_each(reverse, "pull_back", beats):
        backtrail.DIT(curvature=policy).attribute(run, queries)
    return beats.ratio(run.steps)


def checked(run: backtrail.Run) -> float:
    """The check of the derivatives, which every run gets once, in plain steps."""
    step = stepping()
    step()
    one_step = min(seconds(step) for _ in range(BEATS * 5))
    return seconds(lambda: check_derivatives(run, backtrail.Hessian())) / one_step


def recorded(folder: Path) -> float:
    """A recorded loop with the default policy."""
    task, optimizer, loader = prepared(RECORDED)
    beats = Beats(stepping(), clock=time.perf_counter)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for batch in recorder.watch(loader):
            train(task, optimizer, [batch])
            beats()
    return beats.ratio(RECORDED)


def main() -> None:
    """Print the table."""
    folder = Path(tempfile.mkdtemp())
    run, (few, most) = swept_run(folder / "short"), QUERIES
    # First, so that it is no part of a sweep of a few steps.
    print(f"check / plain step, once a run   {checked(run):.1f}", flush=True)
    print("sweep / plain            1 query   16 queries   each further")
    for name, policy in POLICIES.items():
        one, many = (swept(run, policy, count) for count in QUERIES)
        print(f"{name:24}{one:8.2f}{many:13.1f}{(many - one) / (most - few):15.2f}", flush=True)
    print(f"recording / plain            {recorded(folder / 'long'):.3f}")


if __name__ == "__main__":
    main()
