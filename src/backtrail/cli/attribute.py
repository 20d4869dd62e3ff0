"""`backtrail attribute`: the influence of every training sample on some queries."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from backtrail.cli import show
from backtrail.cli.arguments import Reference, RunFolder
from backtrail.cli.reference import queries_at, task_at

States = Annotated[Literal["end", "epochs"] | tuple[int, ...], arg(metavar="end|epochs|STATE ...")]


def attribute(
    run: RunFolder,
    *,
    task: Reference,
    queries: Reference,
    out: Path,
    observed_at: States = "end",
    method: Literal["dit", "dve", "tracin", "gradient-dot"] = "dit",
) -> None:
    """Compute how much every training sample moved the queries, at every step; resumes where it was interrupted.

    Example: backtrail attribute runs/digits --task my_file.py:task --queries my_file.py:queries
    --observed-at epochs --out runs/digits/dit

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        queries: What is asked, such as a backtrail.Loss: a Python file and a name in it.
        out: Folder for the influence.
        observed_at: States that the queries read: the last, the end of every epoch, or numbers.
            Windows end at them.
        method: How it is computed: dit (exact, one sweep back through the run); dve (by projected
            vectors of all visits); or a cheap baseline, a product of gradients: tracin (at every
            step), gradient-dot (at the observed state).
    """
    from backtrail.methods.dit.dit import DIT
    from backtrail.methods.dve.dve import DataValueEmbedding
    from backtrail.methods.gradient_dot.tracin import GradientDot, TracIn
    from backtrail.run.run import open_run

    methods: dict[str, DIT | DataValueEmbedding | TracIn | GradientDot] = {
        "dit": DIT(),
        "dve": DataValueEmbedding(),
        "tracin": TracIn(),
        "gradient-dot": GradientDot(),
    }
    found = methods[method].attribute(
        open_run(run, task_at(task)), queries_at(queries), observed_at=observed_at, out=out
    )
    show.say(f"{found}\nin {out}")
    show.next_command("top", out)
