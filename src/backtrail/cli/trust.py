"""`backtrail trust`: checks of an influence against its own run."""

from typing import TYPE_CHECKING

from backtrail.cli import show
from backtrail.cli.arguments import InfluenceFolder, Reference, RunFolder
from backtrail.cli.reference import queries_at, task_at

if TYPE_CHECKING:
    from backtrail.apply.trust import Trust


def trust(
    run: RunFolder,
    influence: InfluenceFolder,
    *,
    task: Reference,
    queries: Reference,
    removals: int = 32,
    seed: int = 0,
) -> int:
    """Check an influence: replay the run, test the derivative, and retrain without some samples.

    Example: backtrail trust runs/digits runs/digits/dit --task my_file.py:task --queries
    my_file.py:queries

    Exits with 0 if every check passed, with 1 if one failed.

    Args:
        run: Folder of a recorded training.
        influence: Folder written by `backtrail attribute` from this run.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        queries: The queries of the influence: a Python file and the name of the query in it.
        removals: Number of samples to leave out, one at a time.
        seed: Seed of the random choice of these samples.
    """
    from backtrail.apply.trust import trust as check
    from backtrail.influence.influence import open_influence
    from backtrail.run.run import open_run

    recorded = open_run(run, task_at(task))
    opened = open_influence(influence)
    statement = check(recorded, opened, queries=queries_at(queries), removals=removals, seed=seed)
    show.say(statement)
    show.next_command("top", influence)
    return 0 if all_passed(statement) else 1


def all_passed(statement: "Trust") -> bool:
    """Whether no check failed; a check that could not be made counts as passed."""
    # A replay that failed is described by a string.
    if isinstance(statement.replay, str):
        return False
    if statement.derivative is not None and not statement.derivative.passed:
        return False
    return statement.removal.passed
