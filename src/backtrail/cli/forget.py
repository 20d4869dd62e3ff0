"""`backtrail forget`: the trained model without the influence of some samples."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from backtrail.cli import show
from backtrail.cli.arguments import Reference, RunFolder, check_file
from backtrail.cli.reference import in_same_file, rows_at, task_at

Samples = Annotated[tuple[int, ...], arg(metavar="SAMPLE ...")]
OptionalReference = Annotated[str | None, arg(metavar="FILE.py:NAME")]


def forget(
    run: RunFolder,
    *,
    task: Reference,
    samples: Samples,
    out: Path,
    replay: int = 0,
    test: OptionalReference = None,
) -> None:
    """Remove the influence of some samples from the trained model, and write it to a file.

    Example: backtrail forget runs/digits --task my_file.py:task --samples 12 77 --replay 50 --out
    forgotten.safetensors

    To first order through the recorded run, then by a replay of its last steps. This gives no legal
    or privacy guarantee. --test compares the result with retraining without the samples.

    Args:
        run: Folder of a recorded training.
        task: The backtrail.Task of the training: a Python file and the name of the task in it, or
            of a function that returns it.
        samples: Rows of the training set to forget, or ids where batches carry ids.
        out: File for the parameters and buffers, .safetensors; an existing file is replaced.
        replay: Number of last steps to replay without the samples; all steps is retraining.
        test: A data set that was not trained on, as a Python file and the name of the data set in
            it: compare with retraining on its rows.

    Raises:
        BadSetting: No samples are given.
    """
    from safetensors.torch import save_file

    from backtrail.apply.unlearning import forget as forget_samples
    from backtrail.apply.unlearning_report import judge_forgetting
    from backtrail.errors import BadSetting
    from backtrail.run.files import replacing
    from backtrail.run.run import open_run

    check_file(out, ".safetensors")
    if not samples:
        raise BadSetting("samples", "", "one or more samples to forget")
    rows = None if test is None else rows_at(test)
    recorded = open_run(run, task_at(task))
    state = forget_samples(recorded, samples, replay=replay)
    with replacing(out) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, scratch)
    show.say(f"{len(set(samples))} samples forgotten, {len(state)} tensors written to {out}")
    if rows is not None:
        show.say(judge_forgetting(recorded, samples, state, test=rows))
    words = ("forget", run, "--task", task, "--samples", *samples, "--out", out, "--replay")
    if test is None:
        test_reference = in_same_file(task, "test")
        show.next_command(*words, replay, "--test", test_reference)
    elif replay < recorded.steps:
        # Replaying all steps is retraining; comparing that with itself has no next step.
        show.next_command(*words, recorded.steps, "--test", test)
