"""`backtrail clean`: the training samples whose label is probably wrong."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from backtrail.cli import show
from backtrail.cli.arguments import Form, Reference, RunFolder
from backtrail.cli.reference import in_same_file, rows_at, task_at

TABLE_ROWS = 20  # printed by --form table


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
    """List the training samples whose label is probably wrong, the most suspicious first.

    Example: backtrail clean runs/digits --task my_file.py:task --out review.csv

    The data set itself is not changed.

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        method: Score to rank by: held-out (predictions of re-runs that left the sample out), an
            average over checkpoints (mean-loss, margin, el2n, tracin), loss (at the end),
            self-influence (by Diff-In), or the harm to the mean validation loss (dit, dve).
        validation: A data set with right labels, for dit and dve; by default the training set.
        out: File for the whole ranking, .csv or .parquet.
        form: Output format; a table shows the first 20, json and csv all of them.
    """
    from backtrail.apply.cleaning import find_mislabeled
    from backtrail.run.run import open_run

    rows = None if validation is None else rows_at(validation)
    recorded = open_run(run, task_at(task))
    ranking = find_mislabeled(recorded, method=method, validation=rows, out=out)
    shown = ranking.head(TABLE_ROWS) if form == "table" else ranking
    caption = f"the {len(shown)} most suspicious of {len(ranking)} samples, by {method}"
    if out is not None:
        caption += f"; the whole ranking is in {out}"
    show.table(shown, form, caption=caption)
    if out is None:
        show.next_command(
            "clean", run, "--task", task, "--method", method, "--out", "review.csv", form=form
        )
    else:
        queries = in_same_file(task, "queries")
        words = ("--task", task, "--queries", queries, "--out", run / "influence")
        show.next_command("attribute", run, *words, form=form)
