"""Whether a sweep by differences fits into training's own memory, and capturing beside it.

python -m bench.own_memory

Peak resident memory of the GPT of bench.sweep, trained, captured while it trains, or swept for one
query, each in a process of its own that has done everything once in small, so that imported
libraries are no part of it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import backtrail
from backtrail.accel.context import accelerated
from bench import memory, sweep
from bench.models import GPT, sentences

STEPS = 6  # the recorder proves the first two and the fifth
CAPTURES = {
    "recording": None,
    "capturing, empirical": backtrail.DataValueEmbedding(fisher="empirical"),
    "capturing, true, an eighth": backtrail.DataValueEmbedding(drawn=1 / 8),
    "capturing, true": backtrail.DataValueEmbedding(),
}
POLICIES = {
    "Hessian, difference": backtrail.Hessian("difference"),
    "Gauss-Newton, difference": backtrail.GaussNewton("difference"),
    "Hessian, autograd": backtrail.Hessian(),
}


def in_small() -> None:
    """Load what training, recording and sweeping load."""
    data = sentences(8, context=8)
    task = backtrail.language_model(GPT(width=8, layers=1, context=8), data)
    optimizer, loader = torch.optim.AdamW(task.model.parameters()), DataLoader(data, batch_size=4)
    folder = record(task, optimizer, loader, capture=CAPTURES["capturing, true"])
    run = backtrail.open_run(folder, task)
    for policy in POLICIES.values():
        backtrail.DIT(curvature=policy).attribute(run, backtrail.Loss(data, samples=[0]))
    tall = torch.ones(1024, 64)
    with accelerated():  # whose library small networks do without
        tall @ tall.T, tall.T @ tall


def record(
    task: backtrail.Task,
    optimizer: torch.optim.Optimizer,
    loader: "DataLoader[Any]",
    *,
    capture: backtrail.DataValueEmbedding | None,
) -> Path:
    """Record a training; where to."""
    folder = Path(tempfile.mkdtemp()) / "run"
    with backtrail.Recorder(folder, task, optimizer, capture=capture) as recorder:
        sweep.train(task, optimizer, recorder.watch(loader))
    return folder


def alone(what: str, folder: str) -> None:
    """Print the MiB that a training or a sweep adds at its peak."""
    in_small()
    memory.forget_peak()
    before = memory.resident("VmRSS")
    task, optimizer, loader = sweep.prepared(STEPS)
    if what == "training":
        sweep.train(task, optimizer, loader)
    elif what in CAPTURES:
        record(task, optimizer, loader, capture=CAPTURES[what])
    else:
        run = backtrail.open_run(folder, task)
        backtrail.DIT(curvature=POLICIES[what], chunk=1).attribute(
            run, backtrail.Loss(task.data, samples=[0])
        )
    print((memory.resident("VmHWM") - before) / memory.MIB)


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        return alone(*sys.argv[1:])
    folder = str(Path(tempfile.mkdtemp()) / "run")
    sweep.swept_run(Path(folder), STEPS)
    command = [sys.executable, "-W", "ignore", "-m", "bench.own_memory"]
    print("what                        MiB  / training")
    unit = 0.0
    for what in ("training", *CAPTURES, *POLICIES):
        found = float(
            subprocess.run(
                [*command, what, folder], check=True, capture_output=True, text=True
            ).stdout
        )
        unit = unit or found
        print(f"{what:25} {found:5.0f}  {found / unit:10.2f}", flush=True)
    return None


if __name__ == "__main__":
    main()
