"""What `backtrail demo` measures: functions of its run and influence."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

import backtrail
from backtrail.cli.demo_task import SEED, WRONG, digits, fit, task
from backtrail.influence.influence import Influence
from backtrail.queries import Query, values
from backtrail.run.run import Run
from backtrail.stats import kendall
from backtrail.tree import Tree

REPEATS = 5

SampleScores = Float[np.ndarray, " sample"]


@final
@dataclass(frozen=True, slots=True)
class Overhead:
    """Time of the same training with and without the recorder, in seconds; medians.

    Attributes:
        plain: Without the recorder.
        recorded: With it.
        identical: Whether both trainings end in the same weights, bit for bit.
        steps: Number of steps of a training.
        repeats: Number of trainings of each kind.
    """

    plain: float
    recorded: float
    identical: bool
    steps: int
    repeats: int


def overhead(steps: int, repeats: int = REPEATS) -> Overhead:
    """Train without and with the recorder, and compare times and weights.

    Args:
        steps: Number of steps of a training.
        repeats: Number of trainings of each kind.
    """
    plain_seconds: list[float] = []
    recorded_seconds: list[float] = []
    identical = True
    # Alternately, so that a change of the machine's speed affects both kinds.
    for _ in tqdm(range(repeats), desc="timing the recorder", disable=None, leave=False):
        plain = task()
        recorded = task()
        plain_seconds.append(fit(plain))
        with TemporaryDirectory() as scratch:
            recorded_seconds.append(fit(recorded, Path(scratch) / "run"))
        if not _equal(plain.parameters(), recorded.parameters()):
            identical = False
    return Overhead(
        plain=median(plain_seconds),
        recorded=median(recorded_seconds),
        identical=identical,
        steps=steps,
        repeats=repeats,
    )


def _equal(left: Tree, right: Tree) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def accuracy(learner: backtrail.Task) -> float:
    """Share of the test digits that the trained model classifies correctly."""
    inputs, labels = digits().test.tensors
    with torch.no_grad():
        predicted = learner.model(inputs).argmax(1)
    return float((predicted == labels).float().mean())


def rankings(run: Run, influence: Influence) -> tuple[float, pl.DataFrame]:
    """Compare rankings of the training samples, the most harmful first.

    Returns:
        The test loss of the run, and a table with a row per ranking: how many of its first 100
        samples have a wrong label, and the test loss after training without these 100.
    """
    *_, before_last_epoch, end = influence.observed_at
    scores: dict[str, SampleScores] = {
        "influence, whole run": influence.window(0, end)[0],
        "influence, last epoch only": influence.window(before_last_epoch, end)[0],
        "training loss at the end": -_values_at_end(run, backtrail.Loss(run.task.data)),
        "(random)": np.random.default_rng(SEED).random(influence.samples),
        "(the wrong labels themselves)": -digits().wrong.double().numpy(),
    }
    first: dict[str, np.ndarray] = {}
    for name, values_of_ranking in scores.items():
        first[name] = np.argsort(values_of_ranking, kind="stable")[:WRONG]
    query = backtrail.Loss(digits().test, aggregate="mean")
    retrained = backtrail.retrain(run, query, [group.tolist() for group in first.values()])
    test_loss = retrained.base[0, 0]
    wrong_counts = [int(digits().wrong[group].sum()) for group in first.values()]
    table = pl.DataFrame(
        {
            f"first {WRONG} by": list(first),
            "wrong labels among them": wrong_counts,
            "test loss without them": test_loss + retrained.change[0, 0],
        }
    )
    return float(test_loss), table


def _values_at_end(run: Run, query: Query) -> SampleScores:
    """Values of a query at the final state."""
    state = run.state(run.steps)
    with torch.no_grad():
        found = values(query, run.task, params=state.params, buffers=state.buffers)
    return np.asarray(found.double().numpy())


def most_harmful(influence: Influence, k: int = 10) -> pl.DataFrame:
    """The most harmful samples with their labels, and the epoch in which each did most harm."""
    table = influence.top(k)
    rows = table["sample"].to_list()
    labels = digits().training.tensors[1][rows]
    truth = digits().truth[rows]
    verdicts = ["right label" if same else "wrong label" for same in (labels == truth).tolist()]
    worst_epoch = windows(influence)[:, rows].argmin(axis=0) + 1
    return table.with_columns(
        pl.Series("label", labels.numpy()),
        pl.Series("truth", truth.numpy()),
        pl.Series("verdict", verdicts),
        pl.Series("worst epoch", worst_epoch),
    )


def windows(influence: Influence) -> Float[np.ndarray, "epoch sample"]:
    """Influence on the change of the query during each epoch."""
    totals = influence.total()[0]
    return np.diff(totals, prepend=0.0, axis=0)


def early_late(influence: Influence) -> float:
    """Kendall's tau between the samples' influence on the first epoch and on the last."""
    by_epoch = windows(influence)
    return float(kendall(by_epoch[0], by_epoch[-1]))
