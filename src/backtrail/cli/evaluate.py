"""`backtrail evaluate`: several influences of one run, compared with retraining."""

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
    """Compare influences of one run with retraining: without 32 samples, and without 32 groups.

    Example: backtrail evaluate runs/digits my-dit my-dve --task my_file.py:task --queries
    my_file.py:queries

    Args:
        run: Folder of a recorded training.
        influence: Folders written by `backtrail attribute` from this run, all for the same queries.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        queries: The queries of the influences: a Python file and the name of the query in it.
        bank: Folder that stores the re-runs, for later calls to use again.
        form: Output format.
    """
    from backtrail.apply.evaluation import evaluate as evaluate_influences
    from backtrail.influence.influence import open_influence
    from backtrail.run.run import open_run

    recorded = open_run(run, task_at(task))
    opened = {str(path): open_influence(path) for path in influence}
    table = evaluate_influences(recorded, opened, queries_at(queries), bank=bank)
    caption = "Predicted and actual changes, with 95 % bootstrap intervals over removals."
    show.table(table, form, caption=caption)
    show.next_command("trust", run, influence[0], "--task", task, "--queries", queries, form=form)
