"""What can go wrong in what people do with a run: cleaning, selecting, forgetting."""

from backtrail.errors.sentences import BacktrailError


class NoClasses(BacktrailError):
    """Scores of classes are needed, and the task has other outputs."""

    def __init__(self, problem: str) -> None:
        self.args = (
            "This needs a task of classes: outputs [slot, class] (or an output's entry `logits`), class numbers "
            f"[slot] as the second item of a batch (or its entry `labels`): {problem}. What reads losses alone works "
            "without classes.",
        )
