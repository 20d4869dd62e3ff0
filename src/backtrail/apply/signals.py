"""Scores of training samples that need no influence: what the model predicts for every row.

Rows are read in eval mode, from the data set by number; where samples have ids of their own, from
the batch of their first visit. The axis `sample` is in the order of `run.ids`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from backtrail.errors import CoupledRows, NoClasses
from backtrail.exclusive import exclusive
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.task.classes import class_labels, labels_within
from backtrail.task.classes import class_scores as scores_of_classes
from backtrail.task.coupling import are_rows_coupled
from backtrail.task.task import Batch, in_eval_mode
from backtrail.tree import cast

ROWS = 256  # of the data set that go through the model at once


def losses(run: Run, state: int) -> Float64[np.ndarray, " sample"]:
    r"""The task's own loss of every training sample at a state, :math:`\ell_j(\theta_t)`."""
    return read_rows(run, state, run.task.losses_of)


def outputs(run: Run, state: int) -> Float64[np.ndarray, "sample label"]:
    """The scores (logits) that the model gives to every class at a state.

    Raises:
        NoClasses: the task's outputs are no scores of classes.
    """
    return read_rows(run, state, class_scores)


def class_count(run: Run) -> int:
    """Number of classes of the task; 0 where outputs or labels are not those of a classifier."""
    try:
        return int(outputs(run, run.steps).shape[1])
    except NoClasses:
        return 0


def labels(run: Run) -> Int64[np.ndarray, " sample"]:
    """The class that every training sample is given.

    Raises:
        NoClasses: the task's labels are no classes.
    """
    found = np.zeros(run.samples, dtype=np.int64)
    for places, slots, batch in pieces(run):
        found[places] = class_labels(batch)[slots].cpu().numpy()
    return found


def el2n(run: Run, states: Sequence[int]) -> Float64[np.ndarray, " sample"]:
    r"""EL2N: distance of the probabilities from the label (Paul et al., arXiv 2107.07075).

    .. math:: \operatorname{mean}_t \lVert p_t(x_j) - e_{y_j} \rVert_2

    Raises:
        NoClasses: the task's outputs are no scores of classes.
    """
    given = labels(run)
    distances = []
    for state in states:
        chances = probabilities(outputs(run, state))
        distances.append(_distances(chances, given))
    mean: np.ndarray = np.mean(distances, axis=0)
    return mean


def margins(run: Run, states: Sequence[int]) -> Float64[np.ndarray, " sample"]:
    r"""The label's score minus the best other one, averaged over states: area under the margin.

    .. math:: \operatorname{mean}_t \big[ f_t(x_j)_{y_j} - \max_{c \ne y_j} f_t(x_j)_c \big]

    Pleiss et al., arXiv 2001.10528. It is low where the model, by what it learned from the other
    samples, prefers another class.

    Raises:
        NoClasses: the task's outputs are no scores of classes.
    """
    given = labels(run)
    found = [margin(outputs(run, state), given) for state in states]
    mean: np.ndarray = np.mean(found, axis=0)
    return mean


def margin(
    scores: Float[np.ndarray, "sample label"], given: Int64[np.ndarray, " sample"]
) -> Float64[np.ndarray, " sample"]:
    """The score of the given class minus the best of the others.

    >>> margin(np.array([[1.0, 4.0, 3.0], [1.0, 4.0, 3.0]]), np.array([1, 0])).tolist()
    [1.0, -3.0]
    """
    columns = given[:, None]
    score_of_given = np.take_along_axis(scores, columns, 1)[:, 0]
    others = scores.astype(np.float64)
    np.put_along_axis(others, columns, -np.inf, 1)
    difference: np.ndarray = score_of_given - others.max(axis=1)
    return difference


def probabilities(
    scores: Float[np.ndarray, "*state sample label"],
) -> Float64[np.ndarray, "*state sample label"]:
    """Softmax over the classes.

    >>> probabilities(np.array([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """
    logits = torch.from_numpy(scores.astype(np.float64))
    return logits.softmax(-1).numpy()


def class_scores(outputs: Any, batch: Batch) -> Float[Tensor, "slot label"]:
    """Class scores in the output of `predict`; a single score is that of class 1 against class 0.

    Raises:
        NoClasses: the outputs are no class scores, or the labels no numbers of these classes.
    """
    found = scores_of_classes(outputs)
    labels_within(batch, found)
    return found


def are_classes(outputs: Any, batch: Batch) -> bool:
    """Whether the outputs are scores of classes, and the labels are numbers of these."""
    try:
        class_scores(outputs, batch)
    except NoClasses:
        return False
    return True


def _distances(
    chances: Float[np.ndarray, "sample label"], given: Int64[np.ndarray, " sample"]
) -> Float64[np.ndarray, " sample"]:
    """Distance of the probabilities from the one-hot labels."""
    one_hot = np.eye(chances.shape[1])[given]
    distances: np.ndarray = np.linalg.norm(chances - one_hot, axis=1)
    return distances


@exclusive
def read_rows(run: Run, number: int, function: Callable[[Any, Batch], Tensor]) -> np.ndarray:
    """`function(outputs, batch)` of every sample at a state, `[sample, ...]`."""
    state = run.state(number, replay=True)
    first = True
    like = next(iter(state.params.values()))
    parts = []
    places_of_parts = []
    with in_eval_mode(run.task):
        for places, slots, read in pieces(run):
            batch = cast(read, like.dtype, like.device)
            if first:
                _refuse_coupled(run, state, batch, function)
                first = False
            model_outputs, _ = run.task.outputs(state.params, state.buffers, batch)
            numbers = function(model_outputs, batch)
            parts.append(numbers[slots].detach().double().cpu().numpy())
            places_of_parts.append(places)
    order = np.argsort(np.concatenate(places_of_parts))
    found: np.ndarray = np.concatenate(parts)[order]
    return found


def _refuse_coupled(
    run: Run, state: State, batch: Batch, function: Callable[[Any, Batch], Tensor]
) -> None:
    """Refuse numbers of a row that depend on which rows happen to be read with it.

    Raises:
        CoupledRows: they do.
    """

    def score(model: nn.Module, some: Batch) -> Tensor:
        return function(run.task.predict(model, some), some)

    if are_rows_coupled(run.task, batch, score, params=state.params, buffers=state.buffers):
        raise CoupledRows(
            "The number",
            "Rank the samples by an influence instead: "
            "backtrail.find_mislabeled(run, method=backtrail.DIT().attribute(run, queries))",
        )


def pieces(
    run: Run, rows: int = ROWS
) -> Iterator[tuple[Int64[np.ndarray, " row"], list[int], Batch]]:
    """Every sample once, a few rows at a time: places in `run.ids`, slots of a batch, the batch.

    Where samples have ids of their own, a batch is as it was stored, whatever its size.
    """
    if not run.has_ids:
        for first in range(0, run.samples, rows):
            some = list(range(first, min(first + rows, run.samples)))
            every_slot = list(range(len(some)))
            yield np.array(some), every_slot, run.rows(some)
        return
    unread = set(run.ids.tolist())
    for index in range(run.steps):
        step = run.step(index)
        if unread.isdisjoint(step.samples):
            continue  # so its batches need not be loaded
        for fed, batch in zip(step.fed, run.batches(index), strict=True):
            slot_of = {sample: slot for slot, sample in enumerate(fed.samples) if sample in unread}
            unread -= slot_of.keys()
            if slot_of:
                places = np.searchsorted(run.ids, list(slot_of))
                yield places, list(slot_of.values()), batch
