"""How the queries of a sweep meet the states on its way back: one after the other, or as their average."""

import abc
from dataclasses import dataclass
from functools import cached_property
from typing import final

from backtrail.methods.averaging import as_read
from backtrail.methods.observe import query_gradients
from backtrail.queries import Averaged, Query
from backtrail.run.run import Run
from backtrail.step.state import State
from backtrail.sweep.adjoint import Cotangent, start
from backtrail.tree import Tree, each


class Reading(abc.ABC):
    """Says what a sweep's cotangents gain at a state."""

    @abc.abstractmethod
    def meet(self, number: int, state: State, later: Cotangent | None) -> Cotangent | None:
        """The cotangents of a state, from what later states passed on to it, which is overwritten.

        Those of the queries that are observed at this very state come behind the others; None where
        there are none.
        """


def reading(run: Run, queries: Query, observed_at: tuple[int, ...]) -> Reading:
    """How these queries read a run."""
    if isinstance(queries, Averaged):
        return AsAverage(run, queries, observed_at)
    return AsState(run, queries, observed_at)


@final
@dataclass(frozen=True)
class AsState(Reading):
    """A query reads the observed state alone."""

    run: Run
    queries: Query
    observed_at: tuple[int, ...]

    def meet(self, number: int, state: State, later: Cotangent | None) -> Cotangent | None:
        """Begin the cotangents of the queries that read this state."""
        if number not in self.observed_at:
            return later
        here = start(state, *query_gradients(self.run, self.queries, state))
        return later.join(here) if later else here


@final
@dataclass(frozen=True)
class AsAverage(Reading):
    r"""A query reads the average at the observed state, so every state before it passes on a share of the gradient.

    .. math:: \lambda_t \mathrel{+}= \frac{\partial \bar\theta_\tau}{\partial \theta_t}\, \nabla q(\bar\theta_\tau)

    The gradients come from one forward pass, and one vector per query waits beside the sweep.
    """

    run: Run
    queries: Averaged
    observed_at: tuple[int, ...]

    def meet(self, number: int, state: State, later: Cotangent | None) -> Cotangent | None:
        """Add this state's share of the gradients, and begin the cotangents observed here."""
        if later is not None:
            self._add(number, later)
        if number not in self.observed_at:
            return later
        params, buffers = self.gradients[number]
        share = self.queries.share(number, number)
        here = start(
            state,
            _times(share, params),
            _times(share if self.queries.use_buffers else 1.0, buffers),
        )
        return later.join(here) if later else here

    @cached_property
    def gradients(self) -> dict[int, tuple[Tree, Tree]]:
        """Gradients `[query, ...]` of the queries at the averages, by observed state."""
        first, last = min(self.queries.start, self.observed_at[0]), self.observed_at[-1]
        averages = as_read(self.queries, self.run.walk(first, last))
        return {
            number: query_gradients(self.run, self.queries, average)
            for number, average in averages
            if number in self.observed_at
        }

    def _add(self, number: int, later: Cotangent) -> None:
        """The latest observed state stands first among the cotangents."""
        count, first = len(self.queries.names), 0
        for observed in (observed for observed in reversed(self.observed_at) if observed > number):
            rows, share = slice(first, first + count), self.queries.share(number, observed)
            first += count
            for tree, slopes in zip(
                (later.params, later.buffers), self.gradients[observed], strict=True
            ):
                if share and (tree is later.params or self.queries.use_buffers):
                    for name, slope in slopes.items():
                        tree[name][rows] += share * slope


def _times(share: float, tree: Tree) -> Tree:
    return each(lambda tensor: share * tensor, tree)
