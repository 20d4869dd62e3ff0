r"""Scores of held-out samples: retrain several times, each time without a part of the data.

Every time the samples are cut into parts, each sample is left out of one re-run. The predictions of
that model do not depend on the sample's own label. Re-runs follow the recorded batches. Where the
loss is a mean, the rows that stay share the weight of those that are left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from backtrail.apply.signals import class_count, class_scores, pieces
from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.rerun import evaluate_runs, rerun
from backtrail.task.classes import class_labels
from backtrail.task.task import Batch, Task, in_eval_mode
from backtrail.tree import Tree, cast

FOLDS, REPEATS = 5, 4
ROOM = 2 * 2**30  # bytes for the states that are trained at once
# At its peak a step holds four tensors of the size of a state: the state before, the gradient, the
# update, and the state after.
COPIES = 4


@final
@dataclass(frozen=True, slots=True)
class Crossed:
    """Distance of the models from every label, averaged over states and re-runs.

    It is the distance of the probabilities from the label (EL2N); where the task has no classes,
    the loss.

    Attributes:
        out: by the re-runs that left the sample out.
        inside: by those that did not.
        chances: class probabilities by the re-runs that left the sample out; None where the task
            has no classes.
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
        states: numbers of the states t at which the models are evaluated.
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
    left_out = parted(run.samples, folds=folds, repeats=repeats, seed=seed)
    classes = class_count(run)
    # Column 0 is the distance, the others are the class probabilities.
    out = np.zeros((run.samples, 1 + classes))
    inside = np.zeros(run.samples)
    stacks = math.ceil(len(left_out) / _together(run))
    for some in np.array_split(left_out, stacks):
        for number, stack in _trained_again(run, some, stop=max(states)):
            if number not in states:
                continue
            for places, columns in _evaluated(run, stack, classes):
                gone = some[:, places]
                # The letters: a is a re-run ("again"), s a sample, c a column.
                out[places] += np.einsum("as,asc->sc", gone, columns)
                inside[places] += np.einsum("as,as->s", ~gone, columns[..., 0])
    # In each of the repeats, a sample is left out of one re-run and inside in all the others.
    out /= len(set(states)) * repeats
    inside /= len(set(states)) * repeats * (folds - 1)
    chances = out[:, 1:] if classes else None
    return Crossed(out=out[:, 0], inside=inside, chances=chances)


def parted(
    samples: int, *, folds: int, repeats: int, seed: int
) -> Bool[np.ndarray, "again sample"]:
    """Which samples each re-run leaves out: random parts of nearly equal size.

    >>> parted(4, folds=2, repeats=3, seed=0).sum(axis=0).tolist()
    [3, 3, 3, 3]
    """
    generator = np.random.default_rng(seed)
    numbers = np.arange(folds)[:, None]
    left_out = []
    for _ in range(repeats):
        part_of_sample = generator.permutation(samples) % folds
        left_out.append(part_of_sample == numbers)
    return np.concatenate(left_out)


def _together(run: Run) -> int:
    """How many re-runs fit at once."""
    first = run.state(0)
    size = 0
    for tree in (first.params, first.buffers, *first.moments.values()):
        size += sum(tensor.nbytes for tensor in tree.values())
    return max(1, ROOM // (COPIES * max(size, 1)))


def _trained_again(
    run: Run, left_out: Bool[np.ndarray, "again sample"], *, stop: int
) -> Iterator[tuple[int, State]]:
    """The states of a stack of re-runs, in order."""
    first = run.state(0)
    like = next(iter(first.params.values()))

    def weights(step: int) -> Tensor:
        places = np.searchsorted(run.ids, run.step(step).samples)
        stays = ~left_out[:, places]  # [again, slot]
        if run.task.reduce == "sum":
            weight = np.ones((len(stays), 1))
        else:
            # A mean still divides by all slots of the batch, so those that stay share its weight.
            count = stays.sum(axis=1, keepdims=True)
            weight = stays.shape[1] / np.maximum(count, 1)
        return torch.from_numpy(stays * weight).to(like)

    steps = rerun(run.transition, first.repeat(len(left_out)), weights, start=0, stop=stop)
    yield from tqdm(
        steps, desc="training again", total=stop, unit="step", disable=None, leave=False
    )


def _evaluated(
    run: Run, stack: State, classes: int
) -> Iterator[tuple[Int64[np.ndarray, " sample"], Float64[np.ndarray, "again sample column"]]]:
    """Distances from the label in every re-run and class probabilities, a few samples at a time."""
    like = next(iter(stack.params.values()))
    with in_eval_mode(run.task) as reset_generators:
        for places, slots, read in pieces(run):
            batch = cast(read, like.dtype, like.device)
            read_columns = _columns(run.task, batch, reset_generators, classes=classes)
            columns = evaluate_runs(stack, read_columns)
            yield places, columns[:, slots].double().cpu().numpy()


def _columns(
    task: Task, batch: Batch, reset_generators: Callable[[], None], *, classes: int
) -> Callable[[Tree, Tree], Tensor]:
    """The function from parameters and buffers to distance and probabilities, `[slot, column]`."""

    def read(params: Tree, buffers: Tree) -> Tensor:
        # Whatever a model draws, all re-runs get the same numbers.
        reset_generators()
        outputs, _ = task.outputs(params, buffers, batch)
        if not classes:
            return task.losses_of(outputs, batch)[:, None]
        chances = class_scores(outputs, batch).softmax(1)
        labels = one_hot(class_labels(batch), classes)
        distance = (chances - labels).norm(dim=1, keepdim=True)
        return torch.cat([distance, chances], 1)

    return read
