"""What `backtrail demo` measures: pure functions of its run and influence."""

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

Scores = Float[np.ndarray, " sample"]


@final
@dataclass(frozen=True, slots=True)
class Overhead:
    """Time of the same training with and without the recorder, in seconds; medians.

    Attributes:
        plain: without.
        recorded: with.
        identical: whether both ended in the same weights, bit for bit.
        steps: how many steps a training has.
        repeats: how many trainings of each kind.
    """

    plain: float
    recorded: float
    identical: bool
    steps: int
    repeats: int


def overhead(steps: int, repeats: int = REPEATS) -> Overhead:
    """Train alternately without and with the recorder, and compare times and weights."""
    pairs, identical = [], True
    for _ in tqdm(range(repeats), desc="timing the recorder", disable=None, leave=False):
        with TemporaryDirectory() as scratch:
            bare, watched = task(), task()
            pairs.append((fit(bare), fit(watched, Path(scratch) / "run")))
        identical &= _same(bare.parameters(), watched.parameters())
    plain, recorded = (median(times) for times in zip(*pairs, strict=True))
    return Overhead(plain, recorded, identical, steps, repeats)


def _same(left: Tree, right: Tree) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def accuracy(learner: backtrail.Task) -> float:
    """Share of the test digits that the trained model reads rightly."""
    inputs, labels = digits().test.tensors
    with torch.no_grad():
        return float((learner.model(inputs).argmax(1) == labels).float().mean())


def rankings(run: Run, influence: Influence) -> tuple[float, pl.DataFrame]:
    """Test loss of the run, and for several rankings: wrong labels among the first, test loss when trained without."""
    *_, before, end = influence.observed_at
    names: dict[str, Scores] = {
        "influence, whole run": influence.window(0, end)[0],
        "influence, last epoch only": influence.window(before, end)[0],
        "training loss at the end": -_at_the_end(run, backtrail.Loss(run.task.data)),
        "(drawn at random)": np.random.default_rng(SEED).random(influence.samples),
        "(the wrong labels themselves)": -digits().wrong.double().numpy(),
    }
    first = {name: np.argsort(scores, kind="stable")[:WRONG] for name, scores in names.items()}
    query = backtrail.Loss(digits().test, aggregate="mean")
    found = backtrail.retrain(run, query, [group.tolist() for group in first.values()])
    return float(found.base[0, 0]), pl.DataFrame(
        {
            f"the {WRONG} first by": list(first),
            "wrong labels among them": [
                int(digits().wrong[group].sum()) for group in first.values()
            ],
            "test loss without them": found.base[0, 0] + found.change[0, 0],
        }
    )


def _at_the_end(run: Run, query: Query) -> Scores:
    state = run.state(run.steps)
    with torch.no_grad():
        found: np.ndarray = (
            values(query, run.task, params=state.params, buffers=state.buffers).double().numpy()
        )
    return found


def most_harmful(influence: Influence, k: int = 10) -> pl.DataFrame:
    """The most harmful samples with their labels, and the epoch that made each harmful."""
    table = influence.top(k)
    rows = table["sample"].to_list()
    given, truth = digits().training.tensors[1][rows], digits().truth[rows]
    return table.with_columns(
        pl.Series("label", given.numpy()),
        pl.Series("truth", truth.numpy()),
        pl.Series(
            "verdict",
            ["wrong label" if a != b else "right label" for a, b in zip(given, truth, strict=True)],
        ),
        pl.Series("worst epoch", windows(influence)[:, rows].argmin(axis=0) + 1),
    )


def windows(influence: Influence) -> Float[np.ndarray, "epoch sample"]:
    """Influence on the change of the query during each epoch."""
    return np.diff(influence.total()[0], prepend=0.0, axis=0)


def early_late(influence: Influence) -> float:
    """Kendall's tau between the samples' influence on the first epoch and on the last."""
    found = windows(influence)
    return float(kendall(found[0], found[-1]))
