"""Is the memory of a sweep what the formula says? python -m bench.memory.

Peak resident memory of one attribution above that of the process before it, for several numbers of queries.
"""

import ctypes
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import whence
from bench import sweep
from whence.methods.memory import sizes_of

MIB = 2**20


def resident(field: str) -> int:
    """A memory figure of this process, in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(run: whence.Run, count: int, chunk: int) -> int:
    """Bytes that an attribution adds to the process at its peak."""
    queries = whence.Loss(run.task.data, samples=range(count))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    whence.DIT(chunk=chunk).attribute(run, queries)
    return resident("VmHWM") - before


def gpt(folder: Path) -> whence.Run:
    """Activations weigh more than parameters."""
    return sweep.swept_run(folder)


def wide(folder: Path) -> whence.Run:
    """Parameters weigh more than activations."""
    data = TensorDataset(torch.randn(64, 256), torch.randint(0, 10, (64,)))
    model = nn.Sequential(nn.Linear(256, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 10))
    task, optimizer = whence.classification(model, data), torch.optim.SGD(model.parameters(), lr=0.01)
    with whence.Recorder(folder, task, optimizer) as recorder:
        for inputs, labels in recorder.watch(DataLoader(data, batch_size=16)):
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return whence.open_run(folder, task)


def main() -> None:
    """Print the table."""
    print("model  queries  at once  measured MiB  formula MiB  ratio")
    for build in (gpt, wide):
        run = build(Path(tempfile.mkdtemp()) / "run")
        peak_of(run, 1, 1)
        for count, chunk in ((1, 1), (4, 1), (4, 4), (16, 1), (16, 4)):
            measured = peak_of(run, count, chunk)
            stated = sizes_of(run).total(count, chunk=chunk, held=run.steps)
            figures = f"{measured / MIB:12.0f}  {stated / MIB:11.0f}  {stated / measured:5.2f}"
            print(f"{build.__name__:5}  {count:7}  {chunk:7}  {figures}", flush=True)


if __name__ == "__main__":
    main()
