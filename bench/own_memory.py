"""Does a sweep by differences fit into training's own memory? python -m bench.own_memory.

Peak resident memory of the GPT of bench.sweep, trained or swept for one query, each in a process of its own that has
done everything once in small, so that imported libraries are no part of it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import whence
from bench import memory, sweep

STEPS = 4
POLICIES = {
    "Hessian, difference": whence.Hessian("difference"),
    "Gauss-Newton, difference": whence.GaussNewton("difference"),
    "Hessian, autograd": whence.Hessian(),
}


def in_small() -> None:
    """Load what training, recording and sweeping load."""
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 2, (8,)))
    task = whence.classification(torch.nn.Linear(4, 2), data)
    optimizer, loader = torch.optim.AdamW(task.model.parameters()), DataLoader(data, batch_size=4)
    run = memory.trained(task, optimizer, loader, folder=Path(tempfile.mkdtemp()) / "run")
    for policy in POLICIES.values():
        whence.DIT(curvature=policy).attribute(run, whence.Loss(data, samples=[0]))


def alone(what: str, folder: str) -> None:
    """Print the MiB that a training or a sweep adds at its peak."""
    in_small()
    memory.forget_peak()
    before = memory.resident("VmRSS")
    task, optimizer, loader = sweep.prepared(STEPS)
    if what == "training":
        sweep.train(task, optimizer, loader)
    else:
        run = whence.open_run(folder, task)
        whence.DIT(curvature=POLICIES[what], chunk=1).attribute(run, whence.Loss(task.data, samples=[0]))
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
    for what in ("training", *POLICIES):
        found = float(subprocess.run([*command, what, folder], check=True, capture_output=True, text=True).stdout)
        unit = unit or found
        print(f"{what:25} {found:5.0f}  {found / unit:10.2f}", flush=True)
    return None


if __name__ == "__main__":
    main()
