"""Ground truth: the training run again without some samples.

A removed sample keeps its place in the batch and loses its loss term (weight 0). The truth is
always the difference of two runs of this same engine, the unperturbed one riding along in every
stack, never against the recorded weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack, final, get_args

import numpy as np
import torch
from jaxtyping import Float

from backtrail.errors import BadSetting, ImpossibleWindow
from backtrail.exclusive import exclusive
from backtrail.influence.tables import places
from backtrail.methods.observe import ObservedAt, observed_states
from backtrail.methods.renormalize import check_renormalizable
from backtrail.methods.retrain.cache import Bank, banked
from backtrail.methods.retrain.stacks import Rerunning, Stack
from backtrail.methods.retrain.weights import Change, Removal, Steps
from backtrail.queries import Query, values
from backtrail.run.run import Run
from backtrail.sweep.rerun import each_run

Denominator = Literal["keep", "renormalize"]
Changes = Float[np.ndarray, "query observed_at removal"]


class RerunOptions(TypedDict, total=False):
    """How trainings are run again.

    Attributes:
        denominator: "keep" (default) or "renormalize" the batch's denominator.
        dtype: precision of the re-runs; default float64, None for the recorded one.
        batch: how many trainings run at once; by default 64, and on a processor fewer (from 8)
            where their activations are large.
        weight: weight that a left-out sample's loss keeps; default 0. With 2 it is counted twice
            instead.
        bank: folder in which re-runs are kept, and found again whatever is asked of them; none by
            default. It holds the parameters and buffers of every re-run at every observed state, in
            `dtype`.
    """

    denominator: Denominator
    dtype: torch.dtype | None
    batch: int | None
    weight: float
    bank: str | Path | None


@final
@dataclass(frozen=True, slots=True)
class Retrained:
    """Trainings without samples against the training as it was.

    Attributes:
        change: query after the removal minus query as it was, `[query, observed_at, removal]`.
        base: the queries as they were, `[query, observed_at]`.
        noise: largest difference between two unperturbed runs of one stack, `[query, observed_at]`.
        observed_at: the states read.
    """

    change: Changes
    base: Float[np.ndarray, "query observed_at"]
    noise: Float[np.ndarray, "query observed_at"]
    observed_at: tuple[int, ...]


@exclusive
def leave_one_out(
    run: Run,
    queries: Query,
    *,
    samples: Sequence[int],
    window: Steps | None = None,
    steps: Steps | None = None,
    **options: Unpack[RerunOptions],
) -> Float[np.ndarray, "query sample"]:
    r"""What each query gains when one sample is removed, by training again without it.

    Args:
        run: the recorded training.
        queries: what is asked.
        samples: which samples are left out, one at a time.
        window: (a, b): removed everywhere, and the change of the query between the states a and b,
            :math:`[q(\theta_b^{-j}) - q(\theta_b)] - [q(\theta_a^{-j}) - q(\theta_a)]`.
        steps: (a, b): removed only where it was visited in the steps [a, b), and seen from the end.
        **options: see `RerunOptions`.

    Raises:
        UnknownSample: a sample that the training set does not have.
        ImpossibleWindow: a window that does not lie within the training, or both a window and
            steps.
    """
    for stretch in (window, steps):
        if stretch is not None and not 0 <= stretch[0] <= stretch[1] <= run.steps:
            raise ImpossibleWindow(*stretch, run.steps)
    removals = [[int(sample)] for sample in samples]
    if window is None:
        return retrain(run, queries, removals, steps=steps, **options).change[:, 0]
    states = [state for state in window if state > 0]
    if not states:
        return np.zeros((len(queries.names), len(removals)))
    found = retrain(run, queries, removals, observed_at=states, steps=steps, **options)
    at = {state: found.change[:, place] for place, state in enumerate(found.observed_at)}
    zero = np.zeros((len(queries.names), len(removals)))  # no removal changes state 0
    change: np.ndarray = at.get(window[1], zero) - at.get(window[0], zero)
    return change


@exclusive
def retrain(
    run: Run,
    queries: Query,
    removals: Sequence[Sequence[int]],
    *,
    observed_at: ObservedAt = "end",
    steps: Steps | None = None,
    **options: Unpack[RerunOptions],
) -> Retrained:
    """Train again without each of several groups of samples.

    Args:
        run: the recorded training.
        queries: what is asked.
        removals: groups of samples, each left out together.
        observed_at: the states that the queries read.
        steps: (a, b): removed only where visited in the steps [a, b); everywhere by default.
        **options: see `RerunOptions`.

    Raises:
        UnknownSample: a sample that the training set does not have.
        UnknownId: a sample that the training did not see, where samples have ids of their own.
        BadSetting: an option that is none; a bank together with queries of an average over the
            training, which it cannot answer.
    """
    check_options(options, RerunOptions)
    places(run.ids, [sample for group in removals for sample in group])
    denominator = options.get("denominator", "keep")
    if denominator not in get_args(Denominator):
        raise BadSetting("denominator", denominator, " or ".join(map(repr, get_args(Denominator))))
    renormalize = denominator == "renormalize"
    if renormalize:
        check_renormalizable(run)
    kept, between = options.get("weight", 0.0), steps or (0, run.steps)
    removed = [
        Removal(frozenset(group), between, renormalize=renormalize, weight=kept)
        for group in removals
    ]
    states, dtype = observed_states(run, observed_at), options.get("dtype", torch.float64)
    again = Rerunning(
        run=run, observed_at=states, dtype=dtype, batch=options.get("batch"), queries=queries
    )
    bank = options.get("bank")
    stacks = (
        again.stacks(removed)
        if bank is None
        else banked(Bank(Path(bank), run, dtype), again, removed)
    )
    return _read(run, queries, stacks, observed_at=states, changes=len(removed))


def check_options(given: Mapping[str, object], known: type) -> None:
    """A misspelt option would be left out without a word.

    Raises:
        BadSetting: tells the options that there are.
    """
    for name, value in given.items():
        if name not in known.__annotations__:
            raise BadSetting(name, value, f"only {', '.join(known.__annotations__)}")


@exclusive
def perturb(
    run: Run,
    queries: Query,
    changes: Sequence[Change],
    *,
    observed_at: tuple[int, ...],
    dtype: torch.dtype | None = torch.float64,
    batch: int | None = None,
) -> Retrained:
    """Run the training again under each change of weights, in stacks that start at their first changed step."""
    again = Rerunning(run=run, observed_at=observed_at, dtype=dtype, batch=batch, queries=queries)
    return _read(run, queries, again.stacks(changes), observed_at=observed_at, changes=len(changes))


def _read(
    run: Run, queries: Query, stacks: Iterable[Stack], *, observed_at: tuple[int, ...], changes: int
) -> Retrained:
    """The queries' values at the observed states of stacks of re-runs."""
    shape = (len(queries.names), len(observed_at))
    change, base, noise = np.zeros((*shape, changes)), np.full(shape, np.nan), np.zeros(shape)
    for some, states in stacks:
        found = np.full((*shape, len(some) + 2), np.nan)
        for number, stack in states:
            read = each_run(
                stack,
                lambda params, buffers: values(queries, run.task, params=params, buffers=buffers),
            )
            found[:, observed_at.index(number)] = read.T.double().cpu().numpy()
        change[:, :, some] = found[:, :, 1:-1] - found[:, :, :1]
        noise = np.maximum(noise, np.nan_to_num(np.abs(found[:, :, -1] - found[:, :, 0])))
        base = np.where(np.isnan(found[:, :, 0]), base, found[:, :, 0])
    return Retrained(np.nan_to_num(change), base, noise, observed_at)
