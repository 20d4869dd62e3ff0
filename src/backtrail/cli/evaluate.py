"""`backtrail evaluate`: influences side by side."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from backtrail.cli import show
from backtrail.cli.arguments import Form, Reference, RunFolder
from backtrail.cli.reference import queries_at, task_at


def evaluate(
    run: RunFolder,
    influence: Positional[Annotated[tuple[Path, ...], arg(metavar="INFLUENCE")]],
    *,
    task: Reference,
    queries: Reference,
    bank: Path | None = None,
    form: Form = "table",
) -> None:
    """Judge influences of one run side by side: training again without 32 samples, and 32 groups.

    Example: backtrail evaluate runs/digits my-dit my-dve --task my_file.py:task --queries
    my_file.py:queries

    Args:
        run: Folder of a recorded training.
        influence: Folders written by `backtrail attribute` from this run, all of the same queries.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        queries: The queries of the influences: a Python file and a name in it.
        bank: Folder in which the re-runs are kept, and found again by the next call.
        form: How to print.
    """
    from backtrail.apply.evaluation import evaluate as judge
    from backtrail.influence.influence import open_influence
    from backtrail.run.run import open_run

    recorded, found = (
        open_run(run, task_at(task)),
        {str(path): open_influence(path) for path in influence},
    )
    table = judge(recorded, found, queries_at(queries), bank=bank)
    show.table(
        table,
        form,
        caption="Predicted against actual changes, with 95 % bootstrap intervals over removals.",
    )
    show.next_command("trust", run, influence[0], "--task", task, "--queries", queries, form=form)
