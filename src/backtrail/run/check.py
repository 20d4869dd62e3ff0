"""Whether a task is the one that was recorded: all problems at once, each with its values."""

from backtrail.errors import WrongData, WrongModel
from backtrail.run.manifest import Layout, Manifest
from backtrail.run.tensors import digest
from backtrail.step.state import Step
from backtrail.task.task import Task
from backtrail.tree import Tree


def layouts(tree: Tree) -> dict[str, Layout]:
    """Shape and precision of every tensor."""
    return {
        name: Layout(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in tree.items()
    }


def check_model(manifest: Manifest, task: Task) -> None:
    """Compare the model's tensors with the recorded ones.

    Raises:
        WrongModel: names every tensor that differs, with both shapes.
    """
    recorded = manifest.params | manifest.buffers
    present = layouts(task.parameters() | task.buffers())
    problems = [
        _problem(name, recorded.get(name), present.get(name)) for name in sorted(recorded | present)
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise WrongModel(found)


def _problem(name: str, recorded: Layout | None, present: Layout | None) -> str:
    if recorded is None:
        return f"{name!r} was not recorded"
    if present is None:
        return f"{name!r} {list(recorded.shape)} was recorded and is not in the model"
    if present.shape != recorded.shape:
        return f"{name!r} has shape {list(present.shape)}, and was recorded with {list(recorded.shape)}"
    if present.dtype != recorded.dtype:
        return f"{name!r} is {present.dtype}, and was recorded as {recorded.dtype}"
    return ""


def check_data(manifest: Manifest, task: Task, first: Step) -> None:
    """Compare the data set's length, and the first recorded batch, with the recording.

    Raises:
        WrongData: says both lengths, or that the rows differ, or that there are no rows but ids.
    """
    if manifest.samples is None:
        if task.ids is None:
            raise WrongData(
                "its batches contained the ids of their samples, and this task has no ids="
            )
        return
    if len(task.data) != manifest.samples:
        raise WrongData(f"it has {len(task.data)} rows, and had {manifest.samples}")
    for fed in first.fed:
        if not fed.stored and (found := digest(task.batch(fed.samples))) != fed.digest:
            raise WrongData(
                f"rows {list(fed.samples)[:5]}... of step 0 read {found}, and were {fed.digest}"
            )
