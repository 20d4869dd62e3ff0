"""`backtrail verify`: does the recording explain the training?"""

from backtrail.cli import show
from backtrail.cli.arguments import Reference, RunFolder
from backtrail.cli.reference import beside, task_at


def verify(run: RunFolder, *, task: Reference, tolerance: float | None = None) -> None:
    """Replay a run step by step and compare it with what was recorded.

    Example: backtrail verify runs/digits --task my_file.py:task

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        tolerance: Relative difference allowed in a stretch of 50 steps; by default 1e-9 in float64,
            else 1e-4.
    """
    from backtrail.run.run import open_run

    show.say(f"passed: {open_run(run, task_at(task)).verify(tolerance=tolerance)}")
    asked = ("--task", task, "--queries", beside(task, "queries"), "--observed-at", "epochs")
    show.next_command("attribute", run, *asked, "--out", run / "influence")
