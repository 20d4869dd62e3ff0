"""Checks that a task is the one that was recorded; every problem is reported with its values."""

from backtrail.errors import UnreadableData, WrongData, WrongModel
from backtrail.run.manifest import Layout, Manifest
from backtrail.run.tensors import digest
from backtrail.step.state import Step
from backtrail.task.task import Rows, Task
from backtrail.tree import Tree


def layouts(tree: Tree) -> dict[str, Layout]:
    """Shape and dtype of every tensor."""
    found: dict[str, Layout] = {}
    for name, tensor in tree.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = Layout(tuple(tensor.shape), dtype)
    return found


def check_model(manifest: Manifest, task: Task) -> None:
    """Compare the shapes and dtypes of the task's model with the recorded ones.

    Raises:
        WrongModel: some differ; the message names every such tensor with both shapes.
    """
    recorded = manifest.params | manifest.buffers
    present = layouts(task.parameters() | task.buffers())
    problems: list[str] = []
    for name in sorted(recorded | present):
        problem = _describe_mismatch(name, recorded.get(name), present.get(name))
        if problem is not None:
            problems.append(problem)
    if problems:
        raise WrongModel(problems)


def _describe_mismatch(name: str, recorded: Layout | None, present: Layout | None) -> str | None:
    if recorded is None:
        return f"{name!r} was not recorded"
    if present is None:
        return f"{name!r} {list(recorded.shape)} was recorded and is not in the model"
    if present.shape != recorded.shape:
        shape = list(present.shape)
        return f"{name!r} has shape {shape}, and was recorded with {list(recorded.shape)}"
    if present.dtype != recorded.dtype:
        return f"{name!r} is {present.dtype}, and was recorded as {recorded.dtype}"
    return None


def check_data(manifest: Manifest, task: Task, first: Step) -> None:
    """Compare the length of the task's data set, and the rows of step 0, with the recording.

    Args:
        manifest: of the run.
        task: the task that the run is opened with.
        first: step 0 of the run.

    Raises:
        UnreadableData: the data set cannot be read by row number.
        WrongData: they differ, or the run has sample ids and the task has no `ids=`.
    """
    if manifest.samples is None:
        # Samples are ids that came with the batches; there are no rows to compare.
        if task.ids is None:
            raise WrongData(
                "its batches contained the ids of their samples, and this task has no ids="
            )
        return
    if not isinstance(task.data, Rows):
        raise UnreadableData(type(task.data).__name__)
    if len(task.data) != manifest.samples:
        raise WrongData(f"it has {len(task.data)} rows, and had {manifest.samples}")
    for record in first.fed:
        if record.stored:
            continue
        found = digest(task.batch(record.samples))
        if found != record.digest:
            rows = list(record.samples)[:5]
            raise WrongData(f"rows {rows}... of step 0 read {found}, and were {record.digest}")
