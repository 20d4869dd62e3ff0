"""`backtrail forget`: the trained model without the influence of some samples."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from backtrail.cli import show
from backtrail.cli.arguments import Reference, RunFolder, check_file
from backtrail.cli.reference import beside, rows_at, task_at

Samples = Annotated[tuple[int, ...], arg(metavar="SAMPLE ...")]
Optional = Annotated[str | None, arg(metavar="FILE.py:NAME")]


def forget(
    run: RunFolder,
    *,
    task: Reference,
    samples: Samples,
    out: Path,
    replay: int = 0,
    test: Optional = None,
) -> None:
    """Remove the influence of some samples from the trained model, and write its state_dict to a file.

    Example: backtrail forget runs/digits --task my_file.py:task --samples 12 77 --replay 50 --out
    forgotten.safetensors

    By first order through the recorded run, and a replay of its last steps. No guarantee of law or
    privacy: training again without the samples, which --test does, tells how close it came.

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and a name in it (the task, or a
            function that makes it).
        samples: Rows of the training set to forget (or ids, where samples have ids).
        out: File for the parameters and buffers, .safetensors; it is written anew.
        replay: How many of the last steps run again, truly without the samples; all of them is
            retraining.
        test: A data set that was not trained on, a Python file and a name in it: compare with
            retraining on its rows.

    Raises:
        BadSetting: No samples are named.
    """
    from safetensors.torch import save_file

    from backtrail.apply.unlearning import forget as forgotten
    from backtrail.apply.unlearning_report import judge_forgetting
    from backtrail.errors import BadSetting
    from backtrail.run.files import replacing
    from backtrail.run.run import open_run

    check_file(out, ".safetensors")
    if not samples:
        raise BadSetting("samples", "", "one or more samples to forget")
    rows = None if test is None else rows_at(test)
    recorded = open_run(run, task_at(task))
    state = forgotten(recorded, samples, replay=replay)
    with replacing(out) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, scratch)
    show.say(f"{len(set(samples))} samples forgotten, {len(state)} tensors written to {out}")
    if rows is not None:
        show.say(judge_forgetting(recorded, samples, state, test=rows))
    if (
        test is None or replay < recorded.steps
    ):  # else it is the training without the samples, compared with itself
        again = (
            "--replay",
            recorded.steps if test else replay,
            "--test",
            test or beside(task, "test"),
        )
        show.next_command(
            "forget", run, "--task", task, "--samples", *samples, "--out", out, *again
        )
