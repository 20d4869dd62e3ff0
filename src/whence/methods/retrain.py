"""Ground truth: the training run again without some samples.

A removed sample keeps its place in the batch and loses its loss term (weight 0). The truth is always the difference of
two runs of this same engine, the unperturbed one riding along in every stack, never against the recorded weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from whence.errors import ImpossibleWindow
from whence.influence.tables import places
from whence.methods.observe import ObservedAt, observed_states
from whence.methods.renormalize import check_renormalizable
from whence.queries import Averaged, Query, values
from whence.replay.average import as_read
from whence.replay.forward import each_run, rerun
from whence.replay.state import State
from whence.run.run import Run
from whence.tree import Tree

Steps = tuple[int, int]
Denominator = Literal["keep", "renormalize"]
Changes = Float[np.ndarray, "query observed_at removal"]


class RerunOptions(TypedDict, total=False):
    """How trainings are run again.

    Attributes:
        denominator: "keep" (default) or "renormalize" the batch's denominator.
        dtype: precision of the re-runs; default float64, None for the recorded one.
        batch: how many trainings run at once; default 64.
        weight: weight that a left-out sample's loss keeps; default 0. With 2 it is counted twice instead.
    """

    denominator: Denominator
    dtype: torch.dtype | None
    batch: int
    weight: float


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
        ImpossibleWindow: a window that does not lie within the training, or both a window and steps.
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
    """
    places(run.ids, [sample for group in removals for sample in group])
    renormalize = options.get("denominator", "keep") == "renormalize"
    if renormalize:
        check_renormalizable(run)
    kept, between = options.get("weight", 0.0), steps or (0, run.steps)
    removed = [Removal(frozenset(group), between, renormalize=renormalize, weight=kept) for group in removals]
    return perturb(
        run,
        queries,
        removed,
        observed_at=observed_states(run, observed_at),
        dtype=options.get("dtype", torch.float64),
        batch=options.get("batch", 64),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Nudge:
    """Weights of all slots moved along a direction: 1 + size * direction[step, slot]."""

    direction: Float[Tensor, "step slot"]
    size: float

    def first(self, run: Run) -> int:
        """The first step that differs: from the start."""
        del run
        return 0

    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots."""
        width = len(run.step(step).samples)
        return 1 + self.size * self.direction[step, :width].double()


def sharing(kept: Bool[np.ndarray, "step slot"], real: Bool[np.ndarray, "step slot"]) -> Nudge:
    """Weight 0 for all real slots but those kept, which share what was there: a step is as long as it was.

    A step of which nothing is kept has no gradient (but the penalty's).
    """
    share = real.sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return Nudge(direction=torch.from_numpy(kept * share[:, None] - real), size=1.0)


@final
@dataclass(frozen=True, slots=True)
class Removal:
    """Samples whose loss term loses its weight at the steps [a, b), or gets another."""

    samples: frozenset[int]
    steps: Steps
    renormalize: bool = False
    weight: float = 0.0

    def first(self, run: Run) -> int:
        """The first step that differs; the end if none does."""
        visits = (t for t in range(*self.steps) if not self.samples.isdisjoint(run.log[t].samples))
        return next(visits, run.steps)

    def weights(self, run: Run, step: int) -> Float[Tensor, " slot"]:
        """Weights of a step's slots: 1 but where removed; with renormalisation the others share what is left."""
        slots = run.step(step).samples
        gone = self.samples if self.steps[0] <= step < self.steps[1] else frozenset()
        weights = torch.tensor([self.weight if sample in gone else 1.0 for sample in slots], dtype=torch.float64)
        left = float(weights.sum())
        return weights * (len(slots) / left) if self.renormalize and left > 0 else weights


def perturb(
    run: Run,
    queries: Query,
    changes: Sequence[Removal | Nudge],
    *,
    observed_at: tuple[int, ...],
    dtype: torch.dtype | None = torch.float64,
    batch: int = 64,
) -> Retrained:
    """Run the training again under each change of weights, in stacks that start at their first changed step."""
    order = sorted(range(len(changes)), key=lambda place: changes[place].first(run))
    shape = (len(queries.names), len(observed_at))
    change, base, noise = np.zeros((*shape, len(changes))), np.full(shape, np.nan), np.zeros(shape)
    for begin in tqdm(range(0, len(order), batch), desc="re-running", unit="stack", disable=None, leave=False):
        some = order[begin : begin + batch]
        found = _stack(run, queries, [changes[place] for place in some], observed_at=observed_at, dtype=dtype)
        change[:, :, some] = found[:, :, 1:-1] - found[:, :, :1]
        noise = np.maximum(noise, np.nan_to_num(np.abs(found[:, :, -1] - found[:, :, 0])))
        base = np.where(np.isnan(found[:, :, 0]), base, found[:, :, 0])
    return Retrained(np.nan_to_num(change), base, noise, observed_at)


def _stack(
    run: Run,
    queries: Query,
    changes: Sequence[Removal | Nudge],
    *,
    observed_at: tuple[int, ...],
    dtype: torch.dtype | None,
) -> Float[np.ndarray, "query observed_at run"]:
    """Queries of one stack of runs: as it was, with each change, and as it was again; NaN before any change."""
    first = min(change.first(run) for change in changes)
    start = max(state for state in run.kept if state <= first)
    alike = run.state(start, dtype=dtype)
    like = next(iter(alike.params.values()))

    def weights(step: int) -> Tensor:
        rows = [change.weights(run, step) for change in changes]
        return torch.stack([torch.ones_like(rows[0]), *rows, torch.ones_like(rows[0])]).to(like)

    runs, later = len(changes) + 2, max(observed_at)
    found = np.full((len(queries.names), len(observed_at), runs), np.nan)
    before = _read_at(run, queries, start, dtype=dtype)
    steps = rerun(
        lambda step: run.transition(step, dtype),
        alike.repeat(runs),
        weights,
        start=start,
        stop=later,
        trained=_as_trained(run, start) if any(step.autocast for step in run.log) else None,
    )
    for number, states in as_read(queries, steps, before and before.repeat(runs)):
        if number in observed_at:
            read = each_run(states, lambda params, buffers: values(queries, run.task, params=params, buffers=buffers))
            found[:, observed_at.index(number)] = read.T.double().cpu().numpy()
    return found


def _read_at(run: Run, queries: Query, number: int, *, dtype: torch.dtype | None) -> State | None:
    """The average as it was at a state, which the re-runs go on with; None where queries need none."""
    if not isinstance(queries, Averaged):
        return None
    *_, (_, average) = as_read(queries, run.walk(min(queries.start, number), number, dtype))
    return average


def _as_trained(run: Run, start: int) -> Iterator[tuple[Tree, Tree]]:
    """The gradient before clipping, and the buffers left, of every step from `start` on, in the recorded precision."""
    state = run.state(start)
    for index in range(start, run.steps):
        transition = run.transition(index)
        grads, buffers, _ = transition.raw_gradient(state)
        yield grads, buffers
        kept = index + 1 in run.kept
        state = run.state(index + 1) if kept else transition.moved(state, transition.clipped(grads), buffers)
