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
    method: Literal["dit", "path-integrated", "dve", "tracin", "gradient-dot"] = "dit",
) -> None:
    """Compute the influence of every training sample on the queries, at every step.

    Example: backtrail attribute runs/digits --task my_file.py:task --queries my_file.py:queries
    --observed-at epochs --out runs/digits/dit

    An interrupted attribution resumes when the same command is run again.

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        queries: What to attribute, such as a backtrail.Loss: a Python file and the name of the
            query in it.
        out: Folder for the influence.
        observed_at: States that the queries read: the last state, the end of every epoch, or state
            numbers. Windows begin and end at them.
        method: How to compute it: dit (exact; one backward sweep through the run), path-integrated
            (for memorised samples; four re-runs with random weights, and a sweep along each), dve
            (data value embeddings; one vector per visit), or a cheap baseline, the product of two
            gradients: tracin (at every step) or gradient-dot (at the observed state).
    """
    from backtrail.methods.dit.dit import DIT
    from backtrail.methods.dve.dve import DataValueEmbedding
    from backtrail.methods.gradient_dot.tracin import GradientDot, TracIn
    from backtrail.methods.path_integrated.path_integrated import PathIntegrated
    from backtrail.run.run import open_run

    methods: dict[str, DIT | PathIntegrated | DataValueEmbedding | TracIn | GradientDot] = {
        "dit": DIT(),
        "path-integrated": PathIntegrated(),
        "dve": DataValueEmbedding(),
        "tracin": TracIn(),
        "gradient-dot": GradientDot(),
    }
    recorded = open_run(run, task_at(task))
    influence = methods[method].attribute(
        recorded, queries_at(queries), observed_at=observed_at, out=out
    )
    show.say(influence)
    show.say(f"in {out}")
    show.next_command("top", out)
