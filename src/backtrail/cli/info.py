"""`backtrail info`: what a run folder holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backtrail.cli import show
from backtrail.cli.arguments import Form, RunFolder

if TYPE_CHECKING:
    from backtrail.run.manifest import Manifest
    from backtrail.step.state import Step


def info(run: RunFolder, *, form: Form = "table") -> None:
    """Tell what a run holds: steps, epochs, optimizer, learning rate, batches, kept states, size on disk.

    Example: backtrail info runs/digits

    Needs no task: it reads the manifest and the step log alone.

    Args:
        run: Folder of a recorded training.
        form: How to print.

    Raises:
        EmptyRun: no step was completed.
    """
    from backtrail.errors import EmptyRun
    from backtrail.run.manifest import read_manifest
    from backtrail.run.store import Store

    manifest = read_manifest(run)
    store = Store(run, manifest)
    steps = list(store.log())
    if not steps:
        raise EmptyRun(run)
    kept = [state for state in store.states() if state <= len(steps)]
    captured = (
        {"mebibytes_of_captured_rows": mebibytes(run / "rows")} if (run / "rows").is_dir() else {}
    )
    on_disk = {"states_kept": len(kept), "mebibytes_on_disk": mebibytes(run)} | captured
    show.record(about(manifest) | over(steps) | on_disk, form)
    show.next_command("verify", run, "--task", "FILE.py:task", form=form)


def about(manifest: "Manifest") -> dict[str, object]:
    """What holds for the run as a whole."""
    return {
        "run": manifest.id,
        "finished": manifest.finished,
        "optimizer": manifest.optimizer,
        "parameters": sum(_entries(layout.shape) for layout in manifest.params.values()),
        "training_samples": "with ids" if manifest.samples is None else manifest.samples,
        "checkpoints": manifest.policy,
        "device": manifest.device,
        "torch": manifest.torch,
    }


def _entries(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def over(steps: Sequence["Step"]) -> dict[str, object]:
    """What changes from step to step, as its range."""
    rates = [
        rate
        for step in steps
        for group in step.settings
        if isinstance(rate := group.get("lr"), int | float)
    ]
    return {
        "steps": len(steps),
        "epochs": len({fed.epoch for step in steps for fed in step.fed}),
        "learning_rate": _range(rates),
        "samples_a_step": _range([len(step.samples) for step in steps]),
        "batches_a_step": _range([sum(fed.contributes for fed in step.fed) for step in steps]),
        "gradient_norm": _range([step.norm for step in steps]),
    }


def _range(values: Sequence[float | int]) -> tuple[float | int, float | int] | None:
    return (min(values), max(values)) if values else None


def mebibytes(folder: Path) -> float:
    """Size of all files below a folder, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
