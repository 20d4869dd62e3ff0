"""`backtrail trust`: whether to believe an influence."""

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
    """Check an influence against its own run: replay, derivative, and training again without some samples.

    Example: backtrail trust runs/digits runs/digits/dit --task my_file.py:task --queries
    my_file.py:queries

    Exits with 0 if every check passed, with 1 if one failed.

    Args:
        run: Folder of a recorded training.
        influence: Folder written by `backtrail attribute` from this run.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        queries: The queries of the influence: a Python file and a name in it.
        removals: How many samples are left out, one at a time.
        seed: Of their draw.
    """
    from backtrail.apply.trust import trust as check
    from backtrail.influence.influence import open_influence
    from backtrail.run.run import open_run

    recorded, found = open_run(run, task_at(task)), open_influence(influence)
    statement = check(recorded, found, queries=queries_at(queries), removals=removals, seed=seed)
    show.say(statement)
    show.next_command("top", influence)
    return 0 if all_passed(statement) else 1


def all_passed(statement: "Trust") -> bool:
    """Whether no check failed."""
    derivative = statement.derivative is None or statement.derivative.passed
    return not isinstance(statement.replay, str) and derivative and statement.removal.passed
