"""What embeddings cost, in units of plain training: python -m bench.embedding.

The GPT of bench.sweep under AdamW, recorded with the default policy; rank 256. Processor time on one thread, of parts
that take turns in one process, and of each the least time: a shared machine adds to a time and never takes from it.
Training gets its batches ready-made, without what a loader spends on collating rows.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import whence
from bench import sweep
from bench.models import sentences
from whence.methods.embedding.embedding_store import EmbeddingStore

STEPS, REPEATS = 192, 2
QUERIES, SWEPT, SHORT = 1000, 16, 4  # asked of the embeddings; and of a sweep, over so many steps with all states kept
FISHERS = "empirical", "true"


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def plain() -> float:
    """Of the training alone."""
    task, optimizer, loader = sweep.prepared(STEPS)
    ready = list(loader)
    return seconds(lambda: sweep.train(task, optimizer, ready))


def captured(fisher: str, out: Path) -> float:
    """Of a recorded training that captures rows while it runs."""
    task, optimizer, loader = sweep.prepared(STEPS)

    def recorded() -> None:
        capture = whence.DataValueEmbedding(fisher=fisher)  # type: ignore[arg-type]
        with whence.Recorder(out, task, optimizer, capture=capture) as recorder:
            sweep.train(task, optimizer, recorder.watch(loader))

    return seconds(recorded)


def embedded(run: whence.Run, fisher: str, out: Path) -> tuple[float, float]:
    """Of the pass over the training and the recursion together, and of the recursion alone."""
    captured: list[float] = []
    real = EmbeddingStore.mark_captured

    def noting(store: EmbeddingStore, shard: int) -> None:
        real(store, shard)
        captured.append(time.process_time())

    EmbeddingStore.mark_captured = noting  # type: ignore[method-assign]
    begun = time.process_time()
    try:
        whence.DataValueEmbedding(fisher=fisher).embed(run, out=out)  # type: ignore[arg-type]
    finally:
        EmbeddingStore.mark_captured = real  # type: ignore[method-assign]
    return time.process_time() - begun, time.process_time() - captured[-1]


def swept(folder: Path) -> float:
    """Of all queries by the exact sweep over all steps, extrapolated from a few of both: its growth is linear."""
    run = sweep.swept_run(folder, SHORT)
    one, many = (
        seconds(partial(whence.DIT().attribute, run, whence.Loss(run.task.data, samples=range(count))))
        for count in (1, SWEPT)
    )
    return STEPS / SHORT * (one + (QUERIES - 1) * (many - one) / (SWEPT - 1))


def bytes_of(folder: Path) -> int:
    """On disk, in all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    sweep.record(STEPS, folder / "run")
    run = whence.open_run(folder / "run", sweep.prepared(STEPS)[0])
    units, times = [], dict[str, list[tuple[float, float, float]]]()
    for repeat in range(REPEATS):
        units.append(plain())
        for fisher in FISHERS:
            beside = captured(fisher, folder / f"run with {fisher}{repeat}")
            times.setdefault(fisher, []).append((*embedded(run, fisher, folder / f"{fisher}{repeat}"), beside))
    unit = min(units)
    for fisher, found in times.items():
        whole, recursion, beside = map(min, zip(*found, strict=True))
        print(f"{'':17} recorded and captured / training {beside / unit:.2f}")
        print(f"{fisher + ' Fisher':17} embedding / training            {whole / unit:.2f}")
        print(f"{'':17} steps a second: recursion / training {unit / recursion:.1f}", flush=True)
    embeddings = whence.open_embeddings(folder / "true0", run)
    about = embeddings.about
    formula = about.steps * about.slots * sum(stop - start for start, stop in about.layout.values()) * 4
    print(f"bytes on disk / formula  {bytes_of(folder / 'true0') / formula:.3f}", flush=True)
    queries = whence.Loss(sentences(QUERIES), samples=range(QUERIES))
    asked = seconds(lambda: embeddings.attribute(queries))
    print(f"{QUERIES} queries / training  {asked / unit:.2f}", flush=True)
    exact = swept(folder / "short")
    print(f"{QUERIES} queries / the same by the exact sweep, extrapolated  {asked / exact:.5f}")


if __name__ == "__main__":
    main()
