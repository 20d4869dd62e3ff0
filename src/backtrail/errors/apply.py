"""Errors of what is done with a run: cleaning, selection, unlearning."""

from backtrail.errors.sentences import BacktrailError


class NoClasses(BacktrailError, ValueError):
    """A function needs scores of classes, and the task has other outputs."""

    def __init__(self, problem: str) -> None:
        self.args = (
            f"This task is not a classification: {problem}. Expected outputs [slot, class] (or "
            "under the key `logits`), and class numbers [slot] as the second item of a batch (or "
            "under the key `labels`). Functions that read only losses work without classes.",
        )
