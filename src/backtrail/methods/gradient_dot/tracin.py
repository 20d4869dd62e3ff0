r"""Gradient products, the cheap baselines: TracIn (arXiv 2002.08484) and gradient-dot.

.. math:: I[q, \tau, t, b] =
    \eta_t\, c_{t,b}\, \langle \nabla q(\theta_s),\, \nabla\ell_b(\theta_s) \rangle

for t < τ, with every parameter group's own recorded rate. They differ in the state s at which both
gradients are taken.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from tqdm.auto import tqdm

from backtrail import arguments
from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.gradient_dot.state_products import (
    StateProducts,
    StepScores,
    Tables,
    has_one_gradient,
)
from backtrail.methods.memory import Limits, gradient_chunk, keep_limits, unfinished_chunk
from backtrail.methods.observe import ObservedAt, check_queries, check_run, observed_states
from backtrail.methods.result import begin_or_resume, describe
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.step.state import State

States = Literal["every", "kept"]
StateOf = Callable[[Run, int, int], int]  # run, step t, observed state τ -> the state s


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TracIn:
    r"""How far each visit's own step moved the query, had it been a step of gradient descent.

    .. math:: I[q, \tau, t, b] =
        \eta_t\, c_{t,b}\, \langle \nabla q(\theta_s),\, \nabla\ell_b(\theta_s) \rangle,
        \quad t < \tau

    It ignores the optimizer (preconditioning, momentum, weight decay, clipping: of all this it uses
    the rate alone), the curvature (no later step feels a visit, so an observed state only says
    which visits count), the penalty and the path through BatchNorm's running statistics. Under Adam
    its sizes mean nothing, and its ranking need not. `backtrail.trust` measures both; `DIT` leaves
    out nothing.

    Args:
        states: "every" takes both gradients at the state that the step started from (the paper's
            ideal TracIn), by one replay of the run. "kept" takes them at the kept state before it
            (TracInCP): no replay, and one product per kept state and distinct sample, however many
            steps lie between. Where a sample's gradient depends on its visit (BatchNorm,
            contrastive losses, dropout, stored batches), every visit is computed in its own batch.
        memory: Bytes that may be used beside the model; default half of what is free. It decides
            how many queries are multiplied at once.
        chunk: How many queries are multiplied at once, if you know better.

    Raises:
        BadSetting: Names the setting, and what it may be.
    """

    states: States = "every"
    memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            BadSetting: Names the setting, and what it may be.
        """
        arguments.choice("states", self.states, get_args(States))
        keep_limits(self, Limits(memory=self.memory, chunk=self.chunk))

    @exclusive
    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = "end",
        out: str | Path | None = None,
    ) -> Influence:
        """Influence of every visit on the queries, as TracIn sees it.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful (a
        proponent), negative harmful (an opponent).

        Args:
            run: The recorded training.
            queries: What is asked.
            observed_at: The states up to which visits count: "end", "epochs", a number, or several.
            out: Folder of the result. An unfinished attribution of the same question there is
                resumed, with bit-identical results. None keeps the result in memory.
        """
        method = _GradientProduct(
            name="TracIn",
            state_of=_own_state if self.states == "every" else _kept_state,
            settings={"states": self.states},
            limits=Limits(memory=self.memory, chunk=self.chunk),
        )
        return method.attribute(run, queries, observed_at=observed_at, out=out)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientDot:
    r"""The product of the gradients at the observed state alone, for every visit: the cheapest.

    .. math:: I[q, \tau, t, b] =
        \eta_t\, c_{t,b}\, \langle \nabla q(\theta_\tau),\, \nabla\ell_b(\theta_\tau) \rangle,
        \quad t < \tau

    It ignores all that `TracIn` ignores, and how the training got to that state: visits of one
    sample differ by rate and reduction only. One product per observed state and distinct sample;
    where a sample's gradient depends on its visit (BatchNorm, contrastive losses, dropout, stored
    batches), every visit is computed in its own batch.

    Args:
        memory: Bytes that may be used beside the model; default half of what is free.
        chunk: How many queries are multiplied at once, if you know better.

    Raises:
        BadSetting: Names the setting, and what it may be.
    """

    memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        keep_limits(self, Limits(memory=self.memory, chunk=self.chunk))

    @exclusive
    def attribute(
        self,
        run: Run,
        queries: Query,
        *,
        observed_at: ObservedAt = "end",
        out: str | Path | None = None,
    ) -> Influence:
        """Influence of every visit on the queries, as the gradients at the observed state see it.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful.

        Args:
            run: The recorded training.
            queries: What is asked.
            observed_at: The states at which gradients are taken: "end", "epochs", a number, or
                several.
            out: Folder of the result. An unfinished attribution of the same question there is
                resumed, with bit-identical results. None keeps the result in memory.
        """
        method = _GradientProduct(
            name="GradientDot",
            state_of=_observed_state,
            settings={},
            limits=Limits(memory=self.memory, chunk=self.chunk),
        )
        return method.attribute(run, queries, observed_at=observed_at, out=out)


def _own_state(run: Run, step: int, observed: int) -> int:
    """The state that the step started from."""
    del run, observed
    return step


def _kept_state(run: Run, step: int, observed: int) -> int:
    """The last kept state that is not after the step's own."""
    del observed
    return _last_kept(run, step)


def _last_kept(run: Run, state: int) -> int:
    return run.kept[bisect_right(run.kept, state) - 1]


def _observed_state(run: Run, step: int, observed: int) -> int:
    """The state that the query reads."""
    del run, step
    return observed


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _GradientProduct:
    """What TracIn and GradientDot share: all but the state at which gradients are taken."""

    name: str
    state_of: StateOf
    settings: dict[str, object]
    limits: Limits

    def attribute(
        self, run: Run, queries: Query, *, observed_at: ObservedAt, out: str | Path | None
    ) -> Influence:
        check_run(run)
        check_queries(queries)
        if isinstance(queries, Averaged):
            raise BadSetting(
                "queries",
                queries,
                "queries that are not Averaged; backtrail.DIT supports averages",
            )
        path = arguments.folder_or_none("out", out)
        states = observed_states(run, observed_at)
        chunk = self._chunk(run, queries, states, path)
        description = describe(
            run,
            queries,
            states,
            method=self.name,
            settings=self.settings | {"chunk": chunk, "exact": False},
        )
        writer = begin_or_resume(run, description, path, queries=queries)
        missing = sorted({*range(len(writer.shards))} - writer.done)
        if missing:
            run.check_kept_steps()
            gradient_states = _GradientStates.of(run, states, self.state_of)
            _Attribution(run, queries, writer, gradient_states, chunk).fill(missing)
        return writer.finish().with_queries(queries)

    def _chunk(self, run: Run, queries: Query, states: tuple[int, ...], path: Path | None) -> int:
        """How many queries are multiplied at once; as before where an attribution is resumed."""
        limits = Limits(
            memory=self.limits.memory, chunk=self.limits.chunk or unfinished_chunk(path)
        )
        # Of the states at which gradients are taken, those that one step needs exist at a time.
        at_once = {self.state_of(run, 0, observed) for observed in states}
        return gradient_chunk(run, len(queries.names) * len(at_once), limits=limits)


@final
@dataclass(slots=True)
class _Replay:
    """The states of a run in ascending order, each step between them replayed once."""

    run: Run
    _here: tuple[int, State] | None = None

    def state(self, number: int) -> State:
        """Replay a state from the kept one before it, so that resuming gives the same bits."""
        kept = _last_kept(self.run, number)
        if self._here is None or not kept <= self._here[0] <= number:
            self._here = kept, self.run.state(kept)
        start, state = self._here
        for index in range(start, number):
            state = self.run.transition(index).advance(state)
        self._here = number, state
        return state


@final
@dataclass(frozen=True, slots=True)
class _GradientStates:
    """At which states gradients are taken.

    Attributes:
        columns: For every step, by state s, the columns of the observed states for which s is used.
        steps: For every state s, the steps that use it.
    """

    columns: Sequence[dict[int, list[int]]]
    steps: dict[int, list[int]]

    @staticmethod
    def of(run: Run, observed_at: tuple[int, ...], state_of: StateOf) -> "_GradientStates":
        columns: list[dict[int, list[int]]] = []
        steps: dict[int, list[int]] = {}
        for step in range(run.steps):
            of_step: dict[int, list[int]] = {}
            for column, observed in enumerate(observed_at):
                # A visit after the observed state has no influence on it.
                if step < observed:
                    of_step.setdefault(state_of(run, step, observed), []).append(column)
            for state in of_step:
                steps.setdefault(state, []).append(step)
            columns.append(of_step)
        return _GradientStates(columns, steps)


@final
@dataclass(slots=True)
class _Attribution:
    """An attribution under way, shard by shard from the first to the last."""

    run: Run
    queries: Query
    writer: InfluenceWriter
    states: _GradientStates
    chunk: int
    _scores: dict[int, StepScores] = field(default_factory=dict)  # by state, those in use

    def fill(self, missing: Sequence[int]) -> None:
        """Compute and write the shards that are missing."""
        replay = _Replay(self.run)
        # A table pays where several steps use one state.
        several = any(len(steps) > 1 for steps in self.states.steps.values())
        use_tables = several and has_one_gradient(self.run)
        for shard in tqdm(missing, desc="attributing", unit="shard", disable=None, leave=False):
            first, stop = self.writer.shards[shard]
            queries, observed, _, slots = self.writer.description.shape
            block = np.zeros((queries, observed, stop - first, slots))
            loss = np.full((stop - first, slots), np.nan)
            for step in range(first, stop):
                self._prepare(step, replay, use_tables=use_tables)
                place = step - first
                self._fill_step(step, block=block[:, :, place], loss=loss[place])
            self.writer.write(first, block, loss)
            self.writer.mark_done(shard)

    def _prepare(self, step: int, replay: _Replay, *, use_tables: bool) -> None:
        """Prepare the states that a step uses; let go of those that no later step uses."""
        scores: dict[int, StepScores] = {}
        for state in self.states.columns[step]:
            if state in self._scores:
                scores[state] = self._scores[state]
                continue
            products = StateProducts.at(
                self.run, self.queries, replay.state(state), chunk=self.chunk
            )
            if use_tables:
                scores[state] = Tables.of(products, self.states.steps[state]).of_step
            else:
                scores[state] = products.of_step
        self._scores = scores

    def _fill_step(self, step: int, *, block: np.ndarray, loss: np.ndarray) -> None:
        """Write the scores of a step into `block[query, observed_at, slot]`."""
        for state, columns in self.states.columns[step].items():
            scores, losses = self._scores[state](step)
            block[:, columns, : len(losses)] = scores[:, None]
            # The loss of a visit is the one at the state that its step started from.
            if state == step:
                loss[: len(losses)] = losses
