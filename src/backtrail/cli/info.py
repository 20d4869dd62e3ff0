"""`backtrail info`: what a run contains."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backtrail.cli import show
from backtrail.cli.arguments import Form, RunFolder

if TYPE_CHECKING:
    from backtrail.run.manifest import Manifest
    from backtrail.step.state import Step


def info(run: RunFolder, *, form: Form = "table") -> None:
    """Show what a run contains: steps, optimizer, learning rate, batches, states, size on disk.

    Example: backtrail info runs/digits

    Needs no task: only the manifest and the step log are read.

    Args:
        run: Folder of a recorded training.
        form: Output format.

    Raises:
        EmptyRun: No step was completed.
    """
    from backtrail.errors import EmptyRun
    from backtrail.run.manifest import read_manifest
    from backtrail.run.store import Store

    manifest = read_manifest(run)
    store = Store(run, manifest)
    steps = list(store.log())
    if not steps:
        raise EmptyRun(run)
    fields = run_fields(manifest) | step_fields(steps)
    fields["states_kept"] = len([state for state in store.states() if state <= len(steps)])
    fields["mebibytes_on_disk"] = mebibytes(run)
    captured = run / "rows"
    if captured.is_dir():
        fields["mebibytes_of_captured_rows"] = mebibytes(captured)
    show.record(fields, form)
    show.next_command("verify", run, "--task", "FILE.py:task", form=form)


def run_fields(manifest: "Manifest") -> dict[str, object]:
    """Fields that describe the run as a whole."""
    return {
        "run": manifest.id,
        "finished": manifest.finished,
        "optimizer": manifest.optimizer,
        "parameters": sum(math.prod(layout.shape) for layout in manifest.params.values()),
        "training_samples": "with ids" if manifest.samples is None else manifest.samples,
        "checkpoints": manifest.policy,
        "device": manifest.device,
        "torch": manifest.torch,
    }


def step_fields(steps: Sequence["Step"]) -> dict[str, object]:
    """Fields that describe the steps; what changes from step to step is a range."""
    epochs: set[int] = set()
    rates: list[float | int] = []
    batches_per_step: list[int] = []
    for step in steps:
        epochs.update(batch.epoch for batch in step.fed)
        batches_per_step.append(sum(batch.contributes for batch in step.fed))
        for group in step.settings:
            rate = group.get("lr")
            if isinstance(rate, int | float):
                rates.append(rate)
    return {
        "steps": len(steps),
        "epochs": len(epochs),
        "learning_rate": _range(rates),
        "samples_per_step": _range([len(step.samples) for step in steps]),
        "batches_per_step": _range(batches_per_step),
        "gradient_norm": _range([step.norm for step in steps]),
    }


def _range(values: Sequence[float | int]) -> tuple[float | int, float | int] | None:
    return (min(values), max(values)) if values else None


def mebibytes(folder: Path) -> float:
    """Size of all files in a folder and its subfolders, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
