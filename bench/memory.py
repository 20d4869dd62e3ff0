"""Is the memory of a sweep what the formula says? python -m bench.memory.

Peak resident memory of one attribution above that of the process before it, for several numbers of
queries.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backtrail
from backtrail.methods.memory import sizes_of
from bench import sweep
from bench.models import GPT, sentences

MIB = 2**20


def resident(field: str) -> int:
    """A memory figure of this process, in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Give free memory back, and let the peak begin at what is resident now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(run: backtrail.Run, count: int, chunk: int) -> int:
    """Bytes that an attribution adds to the process at its peak."""
    queries = backtrail.Loss(run.task.data, samples=range(count))
    forget_peak()
    before = resident("VmRSS")
    backtrail.DIT(chunk=chunk).attribute(run, queries)
    return resident("VmHWM") - before


def gpt(folder: Path) -> backtrail.Run:
    """Activations weigh more than parameters."""
    return sweep.swept_run(folder, 4)


def wide(folder: Path) -> backtrail.Run:
    """Parameters weigh more than activations."""
    data = TensorDataset(torch.randn(64, 256), torch.randint(0, 10, (64,)))
    model = nn.Sequential(
        nn.Linear(256, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 10)
    )
    task, optimizer = (
        backtrail.classification(model, data),
        torch.optim.SGD(model.parameters(), lr=0.01),
    )
    return trained(task, optimizer, DataLoader(data, batch_size=16), folder=folder)


def trained(
    task: backtrail.Task,
    optimizer: torch.optim.Optimizer,
    loader: "DataLoader[Any]",
    *,
    folder: Path,
) -> backtrail.Run:
    """Record one epoch."""
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        for inputs, labels in recorder.watch(loader):
            cross_entropy(task.model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return backtrail.open_run(folder, task)


def cnn(folder: Path) -> backtrail.Run:
    """Convolutions and BatchNorm."""
    data = TensorDataset(torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)))
    layers = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, 2, padding=1),
    ]
    model = nn.Sequential(
        *layers,
        nn.BatchNorm2d(64),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    task, optimizer = (
        backtrail.classification(model, data),
        torch.optim.AdamW(model.parameters(), lr=1e-3),
    )
    return trained(task, optimizer, DataLoader(data, batch_size=32), folder=folder)


def broad(folder: Path) -> backtrail.Run:
    """Another language model; its figures had no part in the choice of the formula's constants."""
    torch.manual_seed(0)
    data, model = sentences(64), GPT(width=256, layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    task, loader = backtrail.language_model(model, data), DataLoader(data, batch_size=16)
    with backtrail.Recorder(folder, task, optimizer) as recorder:
        sweep.train(task, optimizer, recorder.watch(loader))
    return backtrail.open_run(folder, task)


def main() -> None:
    """Print the table."""
    print("model  queries  at once  measured MiB  formula MiB  ratio")
    for build in (gpt, wide, cnn, broad):
        run = build(Path(tempfile.mkdtemp()) / "run")
        peak_of(run, 1, 1)
        for count, chunk in ((1, 1), (4, 1), (4, 4), (16, 1), (16, 4)):
            measured = peak_of(run, count, chunk)
            stated = sizes_of(run).total(count, chunk=chunk, held=run.steps)
            figures = f"{measured / MIB:12.0f}  {stated / MIB:11.0f}  {stated / measured:5.2f}"
            print(f"{build.__name__:5}  {count:7}  {chunk:7}  {figures}", flush=True)


if __name__ == "__main__":
    main()
