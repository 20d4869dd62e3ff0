"""Where the cotangents of queries start: at one state, or at all that an average is made of."""

import abc
from dataclasses import dataclass
from functools import cached_property
from typing import final

from backtrail.methods.averaging import read_states
from backtrail.methods.observe import query_gradients
from backtrail.queries import Averaged, Query
from backtrail.step.state import State
from backtrail.sweep.adjoint import Cotangent, start_cotangent
from backtrail.sweep.trajectory import Trajectory
from backtrail.tree import Tree, each


class CotangentSource(abc.ABC):
    """Says what the cotangents of a sweep gain at a state."""

    @abc.abstractmethod
    def add(self, number: int, state: State, later: Cotangent | None) -> Cotangent | None:
        """Add what the queries read at this state to the cotangents from later states.

        Args:
            number: Of the state.
            state: The state.
            later: What later states passed on to it; overwritten. None if nothing.

        Returns:
            The cotangents of this state; those of the queries that are observed here stand behind
            the others. None if there are none.
        """


def cotangent_source(
    run: Trajectory, queries: Query, observed_at: tuple[int, ...]
) -> CotangentSource:
    """Make the source for queries that are observed at some states of a run."""
    if isinstance(queries, Averaged):
        return AverageSource(run, queries, observed_at)
    return StateSource(run, queries, observed_at)


@final
@dataclass(frozen=True)
class StateSource(CotangentSource):
    r"""Queries of the observed state alone: :math:`\lambda_\tau = \nabla q(\theta_\tau)`."""

    run: Trajectory
    queries: Query
    observed_at: tuple[int, ...]

    def add(self, number: int, state: State, later: Cotangent | None) -> Cotangent | None:
        """Start the cotangents of the queries that read this state."""
        if number not in self.observed_at:
            return later
        params, buffers = query_gradients(self.run, self.queries, state)
        here = start_cotangent(state, params, buffers)
        return here if later is None else later.join(here)


@final
@dataclass(frozen=True)
class AverageSource(CotangentSource):
    r"""Queries of the average at the observed state, of which every state before it has a share.

    .. math:: \lambda_t \mathrel{+}=
        \frac{\partial \bar\theta_\tau}{\partial \theta_t}\, \nabla q(\bar\theta_\tau)

    The gradients come from one replay forwards, and one vector per query waits beside the sweep.
    """

    run: Trajectory
    queries: Averaged
    observed_at: tuple[int, ...]

    def add(self, number: int, state: State, later: Cotangent | None) -> Cotangent | None:
        """Add this state's share of the gradients, and start the cotangents observed here."""
        if later is not None:
            self._add_shares(number, later)
        if number not in self.observed_at:
            return later
        params, buffers = self.gradients[number]
        share = self.queries.share(number, number)
        # Buffers that are not averaged are those of the observed state itself.
        buffer_share = share if self.queries.use_buffers else 1.0
        here = start_cotangent(state, _times(share, params), _times(buffer_share, buffers))
        return here if later is None else later.join(here)

    @cached_property
    def gradients(self) -> dict[int, tuple[Tree, Tree]]:
        """Gradients `[query, ...]` of the queries at the averages, by observed state."""
        first = min(self.queries.start, self.observed_at[0])
        states = self.run.walk(first, self.observed_at[-1])
        found: dict[int, tuple[Tree, Tree]] = {}
        for number, average in read_states(self.queries, states):
            if number in self.observed_at:
                found[number] = query_gradients(self.run, self.queries, average)
        return found

    def _add_shares(self, number: int, later: Cotangent) -> None:
        """Add a state's shares of the gradients to the cotangents from later observed states."""
        count = len(self.queries.names)
        first = 0
        # The latest observed state stands first among the cotangents.
        for observed in reversed(self.observed_at):
            if observed <= number:
                break
            rows = slice(first, first + count)
            first += count
            share = self.queries.share(number, observed)
            if not share:
                continue
            params, buffers = self.gradients[observed]
            for name, gradient in params.items():
                later.params[name][rows] += share * gradient
            if self.queries.use_buffers:
                for name, gradient in buffers.items():
                    later.buffers[name][rows] += share * gradient


def _times(factor: float, tree: Tree) -> Tree:
    return each(lambda tensor: factor * tensor, tree)
