"""`backtrail coreset`: a subset of the training set that represents all of it."""

from pathlib import Path
from typing import Literal

from backtrail.cli import show
from backtrail.cli.arguments import Form, Reference, RunFolder, check_file
from backtrail.cli.reference import task_at

TABLE_ROWS = 10  # printed by --form table


def coreset(
    run: RunFolder,
    *,
    task: Reference,
    fraction: float = 0.3,
    method: Literal["dve", "dit", "diff-in", "tracin", "herding", "el2n", "loss", "random"] = "dve",
    out: Path | None = None,
    form: Form = "table",
) -> None:
    """Select the subset of the training set that best represents all of it, class by class.

    Example: backtrail coreset runs/digits --task my_file.py:task --fraction 0.1 --out kept.csv

    Args:
        run: Folder of a recorded training on all data.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        fraction: Share of the samples to keep.
        method: What represents a sample: dve (its effect on the weights), dit, diff-in, tracin (its
            influence on the losses of training rows) or herding (its features); or a score that
            ranks samples one by one: el2n, loss or random.
        out: File for the whole table, .csv; best samples first.
        form: Output format; a table shows the first ten, json and csv all of them.
    """
    from backtrail.apply.coreset import select_coreset
    from backtrail.run.files import replacing
    from backtrail.run.run import open_run

    check_file(out, ".csv")
    recorded = open_run(run, task_at(task))
    kept = select_coreset(recorded, fraction, method=method)
    if out is not None:
        with replacing(out) as scratch:
            kept.write_csv(scratch)
    caption = f"{len(kept)} samples kept, by {method}"
    if len(kept) > TABLE_ROWS:
        caption += f"; the first {TABLE_ROWS}"
    shown = kept.head(TABLE_ROWS) if form == "table" else kept
    show.table(shown, form, caption=caption)
    if out is None:
        words = ("--task", task, "--fraction", fraction, "--method", method, "--out", "kept.csv")
        show.next_command("coreset", run, *words, form=form)
        return
    if form == "table":
        show.say(f"\nthe whole table is in {out}")
    show.next_command("info", run, form=form)
