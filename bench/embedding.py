"""What embeddings cost, in units of plain training: python -m bench.embedding.

The GPT of bench.sweep under AdamW, recorded with the default policy; rank 256. Processor time on
one thread. Between any two steps of what is measured, a step of plain training is taken and timed
apart, so that a slow minute of a shared machine is one for both; its batches are ready-made,
without what a loader spends on collating rows.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import backtrail
from backtrail.methods.dve.dve import _Recursion
from backtrail.methods.dve.gather import Walk
from bench import sweep
from bench.beats import Beats, after_each
from bench.models import sentences

STEPS = 192
QUERIES, SWEPT, SHORT = (
    1000,
    16,
    4,
)  # asked of the embeddings; and of a sweep, over so many steps with all states kept
EMBEDDINGS = {
    "empirical Fisher": backtrail.DataValueEmbedding(fisher="empirical"),
    "true Fisher, of an eighth": backtrail.DataValueEmbedding(drawn=1 / 8),
    "true Fisher": backtrail.DataValueEmbedding(),
}


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def captured(made: backtrail.DataValueEmbedding, out: Path) -> float:
    """A recorded training that captures rows while it runs."""
    task, optimizer, loader = sweep.prepared(STEPS)
    beats = Beats(sweep.stepping())
    with backtrail.Recorder(out, task, optimizer, capture=made) as recorder:
        for batch in recorder.watch(loader):
            sweep.train(task, optimizer, [batch])
            beats()
    return beats.ratio(STEPS)


def embedded(
    run: backtrail.Run, made: backtrail.DataValueEmbedding, out: Path
) -> tuple[float, float]:
    """The pass over the training, and the recursion."""
    beats = Beats(sweep.stepping())
    with after_each(Walk, "step", beats):
        made.gather(run, part=(0, 1), out=out)
    gathering = beats.ratio(STEPS)
    beats = Beats(sweep.stepping())
    with after_each(_Recursion, "_back", beats):
        made.embed(run, out=out)
    return gathering, beats.ratio(STEPS)


def swept(folder: Path) -> float:
    """Of all queries by the exact sweep; the cost is linear, so a few queries and steps suffice."""
    run = sweep.swept_run(folder, SHORT)
    one, many = (
        seconds(
            partial(
                backtrail.DIT().attribute, run, backtrail.Loss(run.task.data, samples=range(count))
            )
        )
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
    run = backtrail.open_run(folder / "run", sweep.prepared(STEPS)[0])
    for name, made in EMBEDDINGS.items():
        beside = captured(made, folder / f"run with {name}")
        gathering, recursion = embedded(run, made, folder / name)
        print(f"{'':25} recorded and captured / training {beside:.2f}")
        print(f"{name:25} embedding / training            {gathering + recursion:.2f}")
        print(f"{'':25} steps a second: recursion / training {1 / recursion:.1f}", flush=True)
    embeddings = backtrail.open_embeddings(folder / name, run)
    about = embeddings.about
    formula = (
        about.steps * about.slots * sum(stop - start for start, stop in about.layout.values()) * 4
    )
    print(f"bytes on disk / formula  {bytes_of(folder / name) / formula:.3f}", flush=True)
    queries, beats = (
        backtrail.Loss(sentences(QUERIES), samples=range(QUERIES)),
        Beats(sweep.stepping()),
    )
    asked = seconds(lambda: embeddings.attribute(queries))
    for _ in range(SHORT * SWEPT):
        beats()
    print(f"{QUERIES} queries / training  {asked / STEPS / beats.unit:.2f}", flush=True)
    exact = swept(folder / "short")
    print(f"{QUERIES} queries / the same by the exact sweep, extrapolated  {asked / exact:.5f}")


if __name__ == "__main__":
    main()
