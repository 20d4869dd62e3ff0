r"""Gradient products, the cheap baselines: TracIn (Pruthi et al., arXiv 2002.08484) and gradient-dot.

.. math:: I[q, \tau, t, b] = \eta_t\, c_{t,b}\, \langle \nabla q(\theta_s),\, \nabla\ell_b(\theta_s) \rangle

for t < τ, with every parameter group's own recorded rate. They differ in the state s at which both
gradients are taken.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from tqdm.auto import tqdm

from backtrail.errors import BadSetting
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.gradient_dot.state_products import Scores, StateProducts, Tables, alike
from backtrail.methods.memory import begun_chunk, check_limits, gradients_at_once
from backtrail.methods.observe import ObservedAt, observed_states
from backtrail.methods.result import begun_writer, described
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.step.state import State

States = Literal["every", "kept"]
Look = Callable[[Run, int, int], int]  # run, step, observed state -> the state s


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TracIn:
    r"""How far each visit's own gradient step moved the query, had it been a step of plain gradient descent.

    .. math:: I[q, \tau, t, b] = \eta_t\, c_{t,b}\, \langle \nabla q(\theta_s),\, \nabla\ell_b(\theta_s) \rangle,
        \quad t < \tau

    It ignores the optimizer (preconditioning, momentum, weight decay, clipping: the rate is all it
    knows of them), the curvature (no later step feels a visit, so an observed state only says which
    visits count), the penalty and the way through BatchNorm's running statistics. Under Adam its
    sizes mean nothing, and its ranking need not. `backtrail.trust` measures both; `DIT` leaves out
    nothing.

    Args:
        states: "every" takes both gradients at the state that the step started from (the paper's
            ideal TracIn), by one replay of the run. "kept" takes them at the kept state before it
            (TracInCP): no replay, and one product per kept state and distinct sample, however many
            steps lie between. Where a sample's gradient depends on its visit (BatchNorm,
            contrastive losses, dropout, stored batches), every visit is computed in its own batch.
        memory: bytes that may be used beside the model; default half of what is free. It decides
            how many queries are multiplied at once.
        chunk: how many queries are multiplied at once, if you know better.

    Raises:
        BadSetting: names the setting, and what it may be.
    """

    states: States = "every"
    memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that are none.

        Raises:
            BadSetting: names the setting, and what it may be.
        """
        if self.states not in get_args(States):
            raise BadSetting("states", self.states, "'every' or 'kept'")
        check_limits(memory=self.memory, chunk=self.chunk)

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
            run: the recorded training.
            queries: what is asked.
            observed_at: the states up to which visits count: "end", "epochs", a number, or several.
            out: folder of the result. An unfinished attribution of the same question there is
                resumed, to the same bits. None keeps the result in memory.
        """
        look = _each_step if self.states == "every" else _kept_before
        question = _Question("TracIn", look, {"states": self.states}, self.memory, self.chunk)
        return question.answered(run, queries, observed_at=observed_at, out=out)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientDot:
    r"""The product of the gradients at the observed state alone, for every visit: the cheapest there is.

    .. math:: I[q, \tau, t, b] = \eta_t\, c_{t,b}\, \langle \nabla q(\theta_\tau),\, \nabla\ell_b(\theta_\tau) \rangle,
        \quad t < \tau

    It ignores all that `TracIn` ignores, and how the training got to that state: visits of one
    sample differ by rate and reduction only. One product per observed state and distinct sample;
    where a sample's gradient depends on its visit (BatchNorm, contrastive losses, dropout, stored
    batches), every visit is computed in its own batch.

    Args:
        memory: bytes that may be used beside the model; default half of what is free.
        chunk: how many queries are multiplied at once, if you know better.

    Raises:
        BadSetting: names the setting, and what it may be.
    """

    memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that are none."""
        check_limits(memory=self.memory, chunk=self.chunk)

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
            run: the recorded training.
            queries: what is asked.
            observed_at: the states at which gradients are taken: "end", "epochs", a number, or
                several.
            out: folder of the result. An unfinished attribution of the same question there is
                resumed, to the same bits. None keeps the result in memory.
        """
        question = _Question("GradientDot", _as_observed, {}, self.memory, self.chunk)
        return question.answered(run, queries, observed_at=observed_at, out=out)


def _each_step(run: Run, step: int, observed: int) -> int:
    del run, observed
    return step


def _kept_before(run: Run, step: int, observed: int) -> int:
    del observed
    return run.kept[bisect_right(run.kept, step) - 1]


def _as_observed(run: Run, step: int, observed: int) -> int:
    del run, step
    return observed


@final
@dataclass(frozen=True, slots=True)
class _Question:
    """A gradient product: its name, where it looks, and what it was told."""

    method: str
    look: Look
    settings: dict[str, object]
    memory: int | None
    chunk: int | None

    def answered(
        self, run: Run, queries: Query, *, observed_at: ObservedAt, out: str | Path | None
    ) -> Influence:
        if isinstance(queries, Averaged):
            raise BadSetting(
                "queries",
                queries,
                "queries of the weights themselves; backtrail.DIT answers for averages",
            )
        path = None if out is None else Path(out)
        states, begun = observed_states(run, observed_at), self.chunk or begun_chunk(path)
        looked_at = {self.look(run, 0, observed) for observed in states}
        chunk = gradients_at_once(
            run, len(queries.names) * len(looked_at), memory=self.memory, chunk=begun
        )
        settings = self.settings | {"chunk": chunk, "exact": False}
        about = replace(described(run, queries, states), method=self.method, settings=settings)
        writer = begun_writer(run, about, path)
        if len(writer.done) < len(writer.shards):
            _Filling.of(run, queries, writer, look=self.look, chunk=chunk).fill()
        return writer.finish().with_queries(queries)


@final
class _Walk:
    """The states of a run in ascending order, each step between them replayed once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._here: tuple[int, State] | None = None

    def __call__(self, number: int) -> State:
        run, kept = self._run, _kept_before(self._run, number, number)
        # A state is always the replay of the kept one before it, so that resuming gives the same
        # bits.
        if self._here is None or not kept <= self._here[0] <= number:
            self._here = kept, run.state(kept)
        start, state = self._here
        for index in range(start, number):
            state = run.transition(index).advance(state)
        self._here = number, state
        return state


@final
@dataclass(frozen=True, slots=True)
class _Filling:
    """An attribution under way: over the shards that are not done, from the first to the last.

    Attributes:
        seen: for every step, the columns of the observed states by the state that they look at.
        spans: for every state looked at, the steps that are seen from there.
        shared: whether a sample has one gradient at a state.
    """

    run: Run
    queries: Query
    writer: InfluenceWriter
    seen: Sequence[dict[int, list[int]]]
    spans: dict[int, list[int]]
    shared: bool
    chunk: int

    @staticmethod
    def of(
        run: Run, queries: Query, writer: InfluenceWriter, *, look: Look, chunk: int
    ) -> "_Filling":
        seen: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(run.steps)]
        spans: dict[int, list[int]] = defaultdict(list)
        for step, columns in enumerate(seen):
            for column, observed in enumerate(writer.description.observed_at):
                if step < observed:
                    columns[look(run, step, observed)].append(column)
            for state in columns:
                spans[state].append(step)
        shared = any(len(steps) > 1 for steps in spans.values()) and alike(run)
        return _Filling(run, queries, writer, seen, spans, shared, chunk)

    def fill(self) -> None:
        views: dict[int, Scores] = {}
        walk, shards = _Walk(self.run), self.writer.shards
        missing = sorted({*range(len(shards))} - self.writer.done)
        for shard in tqdm(missing, desc="attributing", unit="shard", disable=None, leave=False):
            first, stop = shards[shard]
            shape = self.writer.description.shape
            block = np.zeros((*shape[:2], stop - first, shape[3]))
            loss = np.full(block.shape[2:], np.nan)
            for step in range(first, stop):
                # States that no later step looks at are let go.
                views = {
                    state: views.get(state) or self.scores_from(state, walk)
                    for state in self.seen[step]
                }
                self.fill_step(
                    step, views, block=block[:, :, step - first], loss=loss[step - first]
                )
            self.writer.write(first, block, loss)
            self.writer.mark_done(shard)

    def fill_step(
        self, step: int, views: dict[int, Scores], *, block: np.ndarray, loss: np.ndarray
    ) -> None:
        for state, columns in self.seen[step].items():
            scores, losses = views[state](step)
            block[:, columns, : len(losses)] = scores[:, None]
            if state == step:
                loss[: len(losses)] = losses

    def scores_from(self, number: int, walk: _Walk) -> Scores:
        """What visits are worth at a state: looked up where a sample has one gradient there, else visit by visit."""
        view = StateProducts.at(self.run, self.queries, walk(number), chunk=self.chunk)
        return Tables.of(view, self.spans[number]) if self.shared else view.in_batch
