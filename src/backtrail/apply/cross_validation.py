r"""Scores of held-out samples: retrain several times, each time without a part of the data.

A sample is left out of one re-run in every pass over the parts, and what the model makes of it is
read there, unspoilt by its own label. Re-runs follow the recorded batches. Where the loss is a
mean, the rows that stay share the weight of those that go.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from backtrail.apply.signals import class_count, class_labels, class_scores, pieces
from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.rerun import evaluate_runs, rerun
from backtrail.task.task import Batch, Task, in_eval_mode
from backtrail.tree import Tree, cast

FOLDS, REPEATS = 5, 4
ROOM = 2 * 2**30  # bytes of states that are trained at once
# of a state that a step holds at its peak: the state, its gradient, the update, and the one after
COPIES = 4


@final
@dataclass(frozen=True, slots=True)
class Crossed:
    """How far the models are from every label, averaged over states and re-runs.

    Far is the distance of the probabilities from the label (EL2N); where the task has no classes,
    the loss.

    Attributes:
        out: by the re-runs that left the sample out.
        inside: by those that did not.
        chances: probabilities of the classes where it was left out; None where the task has no
            classes.
    """

    out: Float64[np.ndarray, " sample"]
    inside: Float64[np.ndarray, " sample"]
    chances: Float64[np.ndarray, "sample label"] | None


@exclusive
def cross(
    run: Run, states: Sequence[int], *, folds: int = FOLDS, repeats: int = REPEATS, seed: int = 0
) -> Crossed:
    r"""Retrain `folds` x `repeats` times, each time without one part F of the samples.

    .. math:: \mathrm{out}_j = \operatorname{mean}_{t,\, r:\, j \in F_r} d_j(\theta_t^{-F_r}),
        \qquad \mathrm{inside}_j = \operatorname{mean}_{t,\, r:\, j \notin F_r} d_j(\theta_t^{-F_r})

    with the distance :math:`d_j(\theta) = \lVert p(x_j; \theta) - e_{y_j} \rVert_2`, or the loss.

    Args:
        run: the recorded training.
        states: numbers of the states t at which the models are asked.
        folds: how many parts the samples are cut into.
        repeats: how often they are cut anew.
        seed: of the cuts.

    Raises:
        BadSetting: fewer than two parts, more than there are samples, or no repeats.
    """
    if not 2 <= folds <= run.samples:
        raise BadSetting("folds", folds, f"2 <= folds <= {run.samples} (number of samples)")
    if repeats < 1:
        raise BadSetting("repeats", repeats, "a positive integer")
    left_out, classes = (
        parted(run.samples, folds=folds, repeats=repeats, seed=seed),
        class_count(run),
    )
    out, inside = np.zeros((run.samples, 1 + classes)), np.zeros(run.samples)
    for some in np.array_split(left_out, -(-len(left_out) // _together(run))):
        for number, stack in _trained_again(run, some, stop=max(states)):
            for places, read in _readings(run, stack, classes) if number in states else ():
                gone = some[:, places]
                out[places] += np.einsum("as,asc->sc", gone, read)
                inside[places] += np.einsum("as,as->s", ~gone, read[..., 0])
    out /= len(set(states)) * repeats
    inside /= len(set(states)) * repeats * (folds - 1)
    return Crossed(out[:, 0], inside, out[:, 1:] if classes else None)


def parted(
    samples: int, *, folds: int, repeats: int, seed: int
) -> Bool[np.ndarray, "again sample"]:
    """Which samples each re-run leaves out: random parts of nearly equal size.

    >>> parted(4, folds=2, repeats=3, seed=0).sum(axis=0).tolist()
    [3, 3, 3, 3]
    """
    draw = np.random.default_rng(seed)
    parts = [draw.permutation(samples) % folds for _ in range(repeats)]
    return np.concatenate([part == np.arange(folds)[:, None] for part in parts])


def _together(run: Run) -> int:
    """How many re-runs fit at once."""
    first = run.state(0)
    trees = (first.params, first.buffers, *first.moments.values())
    size = sum(tensor.nbytes for tree in trees for tensor in tree.values())
    return max(1, ROOM // (COPIES * max(size, 1)))


def _trained_again(
    run: Run, left_out: Bool[np.ndarray, "again sample"], *, stop: int
) -> Iterator[tuple[int, State]]:
    """The states of a stack of re-runs, in order."""
    first = run.state(0)
    like = next(iter(first.params.values()))

    def weights(step: int) -> Tensor:
        stay = ~left_out[:, np.searchsorted(run.ids, run.step(step).samples)]
        shared = (
            1.0
            if run.task.reduce == "sum"
            else stay.shape[1] / np.maximum(stay.sum(axis=1, keepdims=True), 1)
        )
        return torch.from_numpy(stay * shared).to(like)

    steps = rerun(run.transition, first.repeat(len(left_out)), weights, start=0, stop=stop)
    yield from tqdm(
        steps, desc="training again", total=stop, unit="step", disable=None, leave=False
    )


def _readings(
    run: Run, stack: State, classes: int
) -> Iterator[tuple[Int64[np.ndarray, " sample"], Float64[np.ndarray, "again sample column"]]]:
    """Distances from the label in every re-run and class probabilities, a few samples at a time."""
    like = next(iter(stack.params.values()))
    with in_eval_mode(run.task):
        for places, slots, read in pieces(run):
            columns = _columns(run.task, cast(read, like.dtype, like.device), classes=classes)
            yield places, evaluate_runs(stack, columns)[:, slots].double().cpu().numpy()


def _columns(task: Task, batch: Batch, *, classes: int) -> Callable[[Tree, Tree], Tensor]:
    def read(params: Tree, buffers: Tree) -> Tensor:
        outputs, _ = task.outputs(params, buffers, batch)
        if not classes:
            return task.losses_of(outputs, batch)[:, None]
        chances = class_scores(outputs, batch).softmax(1)
        labels = one_hot(class_labels(batch), classes)
        return torch.cat([(chances - labels).norm(dim=1, keepdim=True), chances], 1)

    return read
