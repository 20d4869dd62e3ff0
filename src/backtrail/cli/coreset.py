"""`backtrail coreset`: the part of the training set that stands for all of it."""

from pathlib import Path
from typing import Literal

from backtrail.cli import show
from backtrail.cli.arguments import Form, Reference, RunFolder, check_file
from backtrail.cli.reference import task_at

FIRST = 10  # rows of the printed table


def coreset(
    run: RunFolder,
    *,
    task: Reference,
    fraction: float = 0.3,
    method: Literal["dve", "dit", "diff-in", "tracin", "herding", "el2n", "loss", "random"] = "dve",
    out: Path | None = None,
    form: Form = "table",
) -> None:
    """Choose the part of the training set that stands best for all of it; of every class its share.

    Example: backtrail coreset runs/digits --task my_file.py:task --fraction 0.1 --out kept.csv

    Args:
        run: Folder of a recorded training on everything.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        fraction: Share of the samples that is kept.
        method: What stands for a sample: dve (what it did to the weights), dit, diff-in, tracin
            (influence on losses of training rows), herding (its features); or what orders samples
            one by one: el2n, loss, random.
        out: File for the whole table, .csv; best first.
        form: How to print; a table shows the first ten.
    """
    from backtrail.apply.coreset import select_coreset
    from backtrail.run.files import replacing
    from backtrail.run.run import open_run

    check_file(out, ".csv")
    found = select_coreset(open_run(run, task_at(task)), fraction, method=method)
    if out is not None:
        with replacing(out) as scratch:
            found.write_csv(scratch)
    told = f"{len(found)} samples kept, by {method}" + (
        f"; the first {FIRST}" if len(found) > FIRST else ""
    )
    show.table(found.head(FIRST) if form == "table" else found, form, caption=told)
    if out is None:
        words = ("--task", task, "--fraction", fraction, "--method", method, "--out", "kept.csv")
        show.next_command("coreset", run, *words, form=form)
        return
    if form == "table":
        show.say(f"\nall of them in {out}")
    show.next_command("info", run, form=form)
