"""Is the memory of a sweep what the formula says? python -m bench.memory.

Peak resident memory of one attribution above that of the process before it, for several numbers of queries.
"""

import ctypes
import tempfile
from pathlib import Path

import torch

import whence
from bench import sweep
from bench.models import GPT, sentences
from whence.methods.memory import budget

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


def main() -> None:
    """Print the table."""
    path = Path(tempfile.mkdtemp()) / "run"
    sweep.loop(path)
    run = whence.open_run(path, sweep.task_of(GPT(), sentences(sweep.STEPS * sweep.SLOTS)))
    peak_of(run, 1, 1)
    print("queries  at once  measured MiB  formula MiB  ratio")
    for count, chunk in ((1, 1), (4, 1), (4, 4), (16, 1), (16, 4), (64, 2)):
        measured = peak_of(run, count, chunk)
        stated = budget(run, count, memory=None, chunk=chunk).total(count, steps=run.steps)
        print(f"{count:7}  {chunk:7}  {measured / MIB:12.0f}  {stated / MIB:11.0f}  {stated / measured:5.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
