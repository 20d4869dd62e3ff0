"""`backtrail clean`: the training samples whose label is probably wrong."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from backtrail.cli import show
from backtrail.cli.arguments import Form, Reference, RunFolder
from backtrail.cli.reference import beside, rows_at, task_at

FIRST = 20  # of the ranking that are for people


def clean(
    run: RunFolder,
    *,
    task: Reference,
    method: Literal[
        "mean-loss", "held-out", "margin", "el2n", "loss", "tracin", "self-influence", "dit", "dve"
    ] = "mean-loss",
    validation: Annotated[str | None, arg(metavar="FILE.py:NAME")] = None,
    out: Path | None = None,
    form: Form = "table",
) -> None:
    """List the training samples whose label is probably wrong, the most suspicious first; the data stays as it is.

    Example: backtrail clean runs/digits --task my_file.py:task --out review.csv

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        method: What to rank by: held-out (what re-runs of the training say that left the sample
            out), an average over checkpoints (mean-loss, margin, el2n, tracin), loss (at the end),
            self-influence (by Diff-In), or the harm to the mean loss (dit, dve).
        validation: A data set with right labels, whose mean loss dit and dve ask about; by default
            the training set.
        out: File for the whole ranking, .csv or .parquet.
        form: How to print: a table of the first 20, or all of them.
    """
    from backtrail.apply.cleaning import find_mislabeled
    from backtrail.run.run import open_run

    rows = None if validation is None else rows_at(validation)
    table = find_mislabeled(open_run(run, task_at(task)), method=method, validation=rows, out=out)
    first = table.head(FIRST) if form == "table" else table
    where = "" if out is None else f"; all of them are in {out}"
    show.table(
        first,
        form,
        caption=f"the {len(first)} most suspicious of {len(table)} samples, by {method}{where}",
    )
    if out is None:
        show.next_command(
            "clean", run, "--task", task, "--method", method, "--out", "review.csv", form=form
        )
    else:
        asked = ("--task", task, "--queries", beside(task, "queries"))
        show.next_command("attribute", run, *asked, "--out", run / "influence", form=form)
