"""`backtrail verify`: replays a run."""

from backtrail.cli import show
from backtrail.cli.arguments import Reference, RunFolder
from backtrail.cli.reference import in_same_file, task_at


def verify(run: RunFolder, *, task: Reference, tolerance: float | None = None) -> None:
    """Replay a run step by step and compare it with the recording.

    Example: backtrail verify runs/digits --task my_file.py:task

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        tolerance: Relative difference allowed after 50 replayed steps; by default 1e-9 in float64,
            5e-2 under autocast, else 1e-4.
    """
    from backtrail.run.run import open_run

    recorded = open_run(run, task_at(task))
    verification = recorded.verify(tolerance=tolerance)
    show.say(f"passed: {verification}")
    show.next_command(
        "attribute",
        run,
        "--task",
        task,
        "--queries",
        in_same_file(task, "queries"),
        "--observed-at",
        "epochs",
        "--out",
        run / "influence",
    )
