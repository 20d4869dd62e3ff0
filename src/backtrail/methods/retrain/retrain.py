"""Ground truth: the training run again without some samples.

A removed sample keeps its place in the batch and loses its loss term (weight 0). The truth is
always the difference of two runs of this same engine, the unperturbed one being part of every
stack, never against the recorded weights: so rounding that both share cancels.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
import torch
from jaxtyping import Float

from backtrail import arguments
from backtrail.errors import BacktrailError, BadSetting, join_items
from backtrail.exclusive import exclusive
from backtrail.methods.observe import (
    ObservedAt,
    check_queries,
    check_run,
    observed_states,
    trained_samples,
)
from backtrail.methods.renormalize import check_renormalizable
from backtrail.methods.retrain.cache import RerunCache, cached_stacks
from backtrail.methods.retrain.stacks import Reruns, RunStack
from backtrail.methods.retrain.weights import Removal, Steps, WeightChange
from backtrail.queries import Query, values
from backtrail.run.run import Run
from backtrail.sweep.rerun import evaluate_runs
from backtrail.task.outside import tensors_used_by
from backtrail.tree import Tree

log = logging.getLogger(__name__)
Denominator = Literal["keep", "renormalize"]


@final
@dataclass(frozen=True, slots=True, repr=False)
class Retrained:
    """What :func:`backtrail.retrain` found: trainings without samples against the recorded one.

    All values are in the unit of the queries.

    >>> import numpy as np
    >>> Retrained(np.zeros((2, 1, 3)), np.zeros((2, 1)), np.zeros((2, 1)), observed_at=(40,))
    Retrained(3 removals, 2 queries, observed at 40)

    Attributes:
        change: Query after the removal minus query as it was, `[query, observed_at, removal]`;
            positive where the removal raises the query. NaN where either is NaN or infinite:
            `diverged` lists the removals.
        base: The queries without a removal, `[query, observed_at]`.
        noise: Largest difference between two unperturbed runs of one stack,
            `[query, observed_at]`; smaller changes mean nothing.
        observed_at: The states at which the queries were read.
        precision: That of the re-runs, like "float64". It is the training's own where the model or
            a query cannot be computed in the one that was asked for.
        remarks: What has to be said about the re-runs, if anything: another precision than asked
            for, or an unperturbed re-run that does not end where the training did.
    """

    change: Float[np.ndarray, "query observed_at removal"]
    base: Float[np.ndarray, "query observed_at"]
    noise: Float[np.ndarray, "query observed_at"]
    observed_at: tuple[int, ...]
    precision: str = "float64"
    remarks: tuple[str, ...] = ()

    @property
    def diverged(self) -> tuple[int, ...]:
        """Numbers of the removals after which some query is NaN or infinite; usually none."""
        is_nan = np.isnan(self.change).any(axis=(0, 1))
        return tuple(np.flatnonzero(is_nan).tolist())

    def __repr__(self) -> str:
        """Sizes in one line, and which removals diverged; never the arrays."""
        queries, _, removals = self.change.shape
        states = join_items(self.observed_at, most=6)
        diverged = ""
        if self.diverged:
            diverged = f"; NaN after removal {join_items(self.diverged, most=6)}"
        return f"Retrained({removals} removals, {queries} queries, observed at {states}{diverged})"


@exclusive
def leave_one_out(
    run: Run,
    queries: Query,
    *,
    samples: Sequence[int],
    window: Steps | None = None,
    steps: Steps | None = None,
    denominator: Denominator = "keep",
    dtype: torch.dtype | None = torch.float64,
    batch: int | None = None,
    weight: float = 0.0,
    bank: str | Path | None = None,
) -> Float[np.ndarray, "query sample"]:
    r"""Change of each query when one sample is removed, by training again without it.

    .. math:: q(\theta_T^{-j}) - q(\theta_T)

    This is what influence predicts, with the same sign: for a loss, positive means that the sample
    was helpful. Unit: the queries' own.

    Args:
        run: The recorded training.
        queries: The scalar functions of the model.
        samples: The samples to remove, one at a time.
        window: (a, b): The sample is removed everywhere, and the result is the change of the query
            between the states a and b,
            :math:`[q(\theta_b^{-j}) - q(\theta_b)] - [q(\theta_a^{-j}) - q(\theta_a)]`.
        steps: (a, b): The sample is removed only from the batches of the steps [a, b).
        denominator: What a removal does to the divisor of its batch's mean: "keep" leaves it,
            "renormalize" divides by the number of samples that are left.
        dtype: Precision of the re-runs; None for the recorded one, which is also taken, with a
            warning, where the model or a query cannot be computed in this one.
        batch: Trainings run at once; by default 64, and on a processor fewer (from 8) where their
            activations are large.
        weight: Weight that a removed sample's loss keeps; with 2 it is counted twice instead.
        bank: Folder in which re-runs are stored and found again, whatever the queries. It holds the
            parameters and buffers of every re-run at every observed state, in `dtype`.

    Returns:
        Array `[query, sample]`, in the order of `samples`.

    Raises:
        UnknownSample: A sample that the training set does not have.
        UnknownId: A sample that the training did not see, where samples have ids of their own.
        ImpossibleWindow: A window or steps that do not lie within the training.
        CannotRenormalize: The batch's denominator cannot be renormalised in this run.
        BadSetting: An option has a value that it cannot take; or a bank together with queries of
            an average over the training, which it cannot answer.
        OtherRun: The bank holds re-runs of another training.
        DamagedBank: A file of the bank cannot be read.
        StrayedRerun: The re-run without a removal is another training than the recorded one.
    """
    check_run(run)
    check_queries(queries)
    if window is not None:
        window = arguments.step_range("window", window, run.steps)
    groups = [[sample] for sample in trained_samples(run, samples)]
    shape = (len(queries.names), len(groups))
    states: ObservedAt = "end"
    if window is not None:
        states = [state for state in window if state > 0]
        if not states:
            return np.zeros(shape)
    found = retrain(
        run,
        queries,
        groups,
        observed_at=states,
        steps=steps,
        denominator=denominator,
        dtype=dtype,
        batch=batch,
        weight=weight,
        bank=bank,
    )
    if window is None:
        return found.change[:, 0]
    # State 0 comes before all batches, so no removal changes it.
    change_at = {0: np.zeros(shape)}
    for place, state in enumerate(found.observed_at):
        change_at[state] = found.change[:, place]
    start, stop = window
    change: np.ndarray = change_at[stop] - change_at[start]
    return change


@exclusive
def retrain(
    run: Run,
    queries: Query,
    removals: Sequence[Sequence[int]],
    *,
    observed_at: ObservedAt = "end",
    steps: Steps | None = None,
    denominator: Denominator = "keep",
    dtype: torch.dtype | None = torch.float64,
    batch: int | None = None,
    weight: float = 0.0,
    bank: str | Path | None = None,
) -> Retrained:
    """Train again without each of several groups of samples.

    The recorded batches are run again in their order, with the recorded random numbers.

    Args:
        run: The recorded training.
        queries: The scalar functions of the model.
        removals: Groups of samples; each group is removed together.
        observed_at: The states at which the queries are read: "end", "epochs", a number, or
            several.
        steps: (a, b): The samples are removed only from the batches of the steps [a, b);
            everywhere by default.
        denominator: What a removal does to the divisor of its batch's mean: "keep" leaves it,
            "renormalize" divides by the number of samples that are left.
        dtype: Precision of the re-runs; None for the recorded one, which is also taken, with a
            warning, where the model or a query cannot be computed in this one.
        batch: Trainings run at once; by default 64, and on a processor fewer (from 8) where their
            activations are large.
        weight: Weight that a removed sample's loss keeps; with 2 it is counted twice instead.
        bank: Folder in which re-runs are stored and found again, whatever the queries. It holds the
            parameters and buffers of every re-run at every observed state, in `dtype`.

    Raises:
        UnknownSample: A sample that the training set does not have.
        UnknownId: A sample that the training did not see, where samples have ids of their own.
        ImpossibleWindow: Steps that do not lie within the training.
        NoSuchState: A state that the run does not have.
        CannotRenormalize: The batch's denominator cannot be renormalised in this run.
        BadSetting: An option has a value that it cannot take; or a bank together with queries of
            an average over the training, which it cannot answer.
        OtherRun: The bank holds re-runs of another training.
        DamagedBank: A file of the bank cannot be read.
        StrayedRerun: The re-run without a removal is another training than the recorded one.
    """
    check_run(run)
    check_queries(queries)
    arguments.choice("denominator", denominator, get_args(Denominator))
    dtype = arguments.precision("dtype", dtype)
    batch = arguments.positive_or_none("batch", batch)
    weight = arguments.real("weight", weight, "a finite number")
    folder = arguments.folder_or_none("bank", bank)
    if steps is not None:
        steps = arguments.step_range("steps", steps, run.steps)
    groups = _groups(run, removals)
    states = observed_states(run, observed_at)
    renormalize = denominator == "renormalize"
    if renormalize:
        check_renormalizable(run)
    run.check_steps()
    stretch = (0, run.steps) if steps is None else steps
    changes = [
        Removal(frozenset(group), stretch, renormalize=renormalize, weight=weight)
        for group in groups
    ]
    reruns = Reruns(run=run, observed_at=states, dtype=dtype, batch=batch, queries=queries)

    def stacks(how: Reruns) -> Iterable[RunStack]:
        if folder is None:
            return how.stacks(changes)
        return cached_stacks(RerunCache(folder, run, how.dtype), how, changes)

    found = _in_a_precision_that_works(reruns, stacks, changes=len(changes))
    if found.diverged:
        log.warning(
            "%d of %d trainings without samples end with a query that is NaN or infinite; their "
            "changes are NaN (samples %s)",
            len(found.diverged),
            len(groups),
            join_items([groups[place] for place in found.diverged], most=6),
        )
    return found


@exclusive
def perturb(
    run: Run,
    queries: Query,
    changes: Sequence[WeightChange],
    *,
    observed_at: tuple[int, ...],
    dtype: torch.dtype | None = torch.float64,
    batch: int | None = None,
) -> Retrained:
    """Run the training again under each of several changes of the samples' weights."""
    reruns = Reruns(run=run, observed_at=observed_at, dtype=dtype, batch=batch, queries=queries)
    return _in_a_precision_that_works(reruns, lambda how: how.stacks(changes), changes=len(changes))


def _in_a_precision_that_works(
    reruns: Reruns, stacks: Callable[[Reruns], Iterable[RunStack]], *, changes: int
) -> Retrained:
    """Re-run and read, in the training's own precision where the one asked for cannot be.

    Tensors that are not part of the batch (a teacher, an adjacency matrix, the rows of a `Custom`
    query) stay in the training's precision, and torch multiplies no two precisions.

    Raises:
        BacktrailError: the task or a query is wrong in any precision.
        OutOfMemoryError: memory ran out.
        RuntimeError: the model fails in its own precision as well.
    """
    run = reruns.run
    try:
        return _read(reruns, stacks(reruns), changes=changes)
    except (BacktrailError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if reruns.dtype in {None, run.task.dtype}:
            raise
        first_line = str(error).partition("\n")[0]
    own = replace(reruns, dtype=None, remarks=[])
    remark = (
        f"re-runs are in {run.task.dtype}, the training's own precision: in {reruns.dtype} the "
        f"model or a query fails ({first_line}){_blame(run, reruns.queries)}"
    )
    log.warning("%s", remark)
    found = _read(own, stacks(own), changes=changes)
    return replace(found, remarks=(remark, *found.remarks))


def _blame(run: Run, queries: Query) -> str:
    """Name the tensors outside of the batch that may be the reason; empty if none are found."""
    functions = [run.task.loss, run.task.predict, run.task.penalty, getattr(queries, "function", 0)]
    names = tensors_used_by(functions, run.task.dtype)
    if not names:
        return ""
    return f". Not part of the batch, and so not cast: {join_items(names, most=6)}"


def _groups(run: Run, removals: object) -> list[list[int]]:
    """Groups of samples, each of which was in some batch.

    Raises:
        BadSetting: They are not one or more groups of one or more whole numbers.
        UnknownSample: A sample that the training set does not have.
        UnknownId: A sample that the training did not see, where samples have ids of their own.
        NeverTrainedOn: A sample that was in no batch.
    """
    expected = "one or more groups of samples, such as [[3], [5, 8]]"
    groups: list[list[int]] = []
    for group in arguments.items("removals", removals, expected):
        groups.append(arguments.whole_numbers("removals", group, least=None, expected=expected))
    if not groups:
        raise BadSetting("removals", removals, expected)
    trained_samples(run, [sample for group in groups for sample in group], "removals")
    return groups


def _read(reruns: Reruns, stacks: Iterable[RunStack], *, changes: int) -> Retrained:
    """Read the queries at the observed states of all stacks."""
    run = reruns.run
    queries = reruns.queries
    observed_at = reruns.observed_at
    # At a recorded state: under `vmap` nothing can be decided by numbers.
    end = run.state(run.kept[-1])
    queries.prepare(run.task, params=end.params, buffers=end.buffers)

    def read(params: Tree, buffers: Tree) -> torch.Tensor:
        return values(queries, run.task, params=params, buffers=buffers)

    shape = (len(queries.names), len(observed_at))
    # A state before a stack's first change is not visited: nothing has changed there.
    change = np.zeros((*shape, changes))
    base = np.full(shape, np.nan)
    noise = np.zeros(shape)
    visited: set[int] = set()
    for stack in stacks:
        for number, states in stack.states:
            place = observed_at.index(number)
            found = evaluate_runs(states, read).T.double().cpu().numpy()  # [query, run]
            unperturbed = found[:, 0]
            # A training that diverged has NaN, or infinity less infinity: no number stands for it.
            with np.errstate(invalid="ignore"):
                difference = found[:, 1:-1] - unperturbed[:, None]
                rounding = np.abs(found[:, -1] - unperturbed)
            finite = np.isfinite(difference)
            change[:, place, stack.places] = np.where(finite, difference, np.nan)
            noise[:, place] = np.fmax(noise[:, place], rounding)
            base[:, place] = unperturbed
            visited.add(place)
    for place, number in enumerate(observed_at):
        if place not in visited:
            state = reruns.unchanged(number)
            # As a stack of one: that also reads models that differentiate by their own inputs.
            values_there = evaluate_runs(state.repeat(1), read)[0]
            base[:, place] = values_there.double().cpu().numpy()
    precision = str(reruns.dtype or run.task.dtype).removeprefix("torch.")
    return Retrained(change, base, noise, observed_at, precision, tuple(reruns.remarks))
