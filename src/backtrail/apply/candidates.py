r"""Samples that may have made a query what it is: the first picks of several cheap scorers.

And the near-copies of a sample in the training set. Near-copies cover for one another: without one
of them, the others teach the same. They are told by the cosine of two samples under the kernel that
TracIn takes at the kept states,

.. math::
    K_{ij} = \sum_t \eta_t \langle \nabla \ell_i(\theta_t), \nabla \ell_j(\theta_t) \rangle,
    \qquad \cos_{ij} = K_{ij} / \sqrt{K_{ii} K_{jj}},

so two rows are near where they change the model alike, whatever kind of data they are.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
from jaxtyping import Float64, Int64

from backtrail.errors import BacktrailError, BadSetting
from backtrail.influence.influence import Influence
from backtrail.influence.tables import places
from backtrail.methods.dit.dit import DIT
from backtrail.methods.dve.embeddings import Embeddings
from backtrail.methods.gradient_dot.tracin import TracIn
from backtrail.methods.method import Method
from backtrail.methods.path_integrated.path_integrated import PathIntegrated
from backtrail.queries import Loss, Query
from backtrail.run.run import Run

log = logging.getLogger(__name__)
Order = Literal["largest", "helpful", "harmful"]
Scorer = Method | Embeddings | Influence
NEAR = 0.5  # cosine from which on samples count as near-copies
MOST_COPIES = 7  # of one sample that are removed together with it


def default_scorers() -> dict[str, Scorer]:
    """TracIn, the derivative, and the integrated derivative with two re-runs."""
    return {"TracIn": TracIn(), "DIT": DIT(), "PathIntegrated": PathIntegrated(runs=2)}


def strength(changes: Float64[np.ndarray, "*axes"], order: Order) -> Float64[np.ndarray, "*axes"]:
    """Numbers that are larger for changes that come earlier in an order."""
    if order == "helpful":
        return changes
    return -changes if order == "harmful" else np.abs(changes)


@final
@dataclass(frozen=True, slots=True)
class Proposals:
    """The order in which every scorer would remove the samples.

    Attributes:
        samples: by scorer, those that were trained on, the first pick first.
    """

    samples: Mapping[str, Int64[np.ndarray, "query rank"]]

    @staticmethod
    def of(
        run: Run,
        queries: Query,
        scorers: Mapping[str, Scorer],
        *,
        order: Order,
        folder: Path | None,
    ) -> "Proposals":
        """Ask every scorer.

        Args:
            run: the recorded training.
            queries: what is explained.
            scorers: by name.
            order: which samples are asked for.
            folder: of their results, where a call that was stopped finds them again.

        Raises:
            BacktrailError: none of them can answer.
        """
        found: dict[str, Int64[np.ndarray, "query rank"]] = {}
        refused: BacktrailError | None = None
        seen = places(run.ids, run.seen.tolist())
        for name, scorer in scorers.items():
            try:
                scores = _scores(run, queries, scorer, folder / name if folder else None)
            except BacktrailError as error:
                # One scorer less changes which samples are tried, and no result.
                log.warning("%s proposes no samples: %s", name, error)
                refused = error
                continue
            strengths = strength(scores[:, seen], order)
            strengths = np.where(np.isnan(strengths), -np.inf, strengths)
            found[name] = run.seen[np.argsort(-strengths, axis=1, kind="stable")]
        if not found and refused is not None:
            raise refused
        return Proposals(found)

    def ranks(self, name: str, query: int) -> dict[int, int]:
        """The rank of every sample for one scorer and query, from 1."""
        ordered = self.samples[name][query].tolist()
        return {sample: rank for rank, sample in enumerate(ordered, start=1)}

    def first_picks(self, query: int, count: int) -> set[int]:
        """The first picks of all scorers for a query."""
        picks: set[int] = set()
        for samples in self.samples.values():
            picks.update(samples[query, :count].tolist())
        return picks

    def dealt(
        self, names: Sequence[str], *, first: int, stop: int | None = None
    ) -> Iterator[tuple[str, int, int]]:
        """Picks in turn: of every scorer and query the first, then the second, and so on.

        Args:
            names: of the scorers.
            first: rank of the first picks, from 0.
            stop: rank of the first pick that is not dealt; None deals all.

        Yields:
            Scorer, query and sample.
        """
        queries, ranks = next(iter(self.samples.values())).shape
        for rank in range(first, ranks if stop is None else min(stop, ranks)):
            for name in names:
                for query in range(queries):
                    yield name, query, int(self.samples[name][query, rank])


def near_copies(run: Run, samples: Sequence[int]) -> dict[int, list[int]]:
    """Near-copies of some samples among all that were trained on, the nearest first.

    Args:
        run: the recorded training.
        samples: some of them.

    Returns:
        By sample; empty where the rows of the training set cannot be read by number.
    """
    try:
        products = _products(run, samples)
        nearest: dict[int, list[int]] = {}
        for sample, row in products.items():
            ordered = sorted(row, key=lambda other: -row[other])
            nearest[sample] = [other for other in ordered if other != sample][:MOST_COPIES]
        unknown = {other for others in nearest.values() for other in others} - {*samples}
        own = _own_products(products)
        if unknown:
            own |= _own_products(_products(run, sorted(unknown)))
    except BacktrailError as error:
        log.warning("near-copies are not looked for: %s", error)
        return {}
    copies: dict[int, list[int]] = {}
    for sample, others in nearest.items():
        copies[sample] = []
        for other in others:
            size = math.sqrt(own[sample] * own[other])
            if size > 0 and products[sample][other] >= NEAR * size:
                copies[sample].append(other)
    return copies


def _products(run: Run, samples: Sequence[int]) -> dict[int, dict[int, float]]:
    """The kernel of some samples with all that were trained on."""
    rows = Loss(run.task.data, samples=samples)
    found = TracIn(states="kept").attribute(run, rows).total()[:, -1]
    columns = places(run.ids, run.seen.tolist())
    products: dict[int, dict[int, float]] = {}
    for sample, row in zip(samples, found[:, columns].tolist(), strict=True):
        products[sample] = dict(zip(run.seen.tolist(), row, strict=True))
    return products


def _own_products(products: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    return {sample: max(row[sample], 0.0) for sample, row in products.items()}


def _scores(
    run: Run, queries: Query, scorer: Scorer, out: Path | None
) -> Float64[np.ndarray, "query sample"]:
    """Scores of all samples at the end of the training.

    Raises:
        BadSetting: It is no scorer.
    """
    if isinstance(scorer, Influence):
        scorer.check_run(run)
        return scorer.total()[:, -1].astype(np.float64)
    if isinstance(scorer, Embeddings):
        return scorer.attribute(queries).total()[:, -1].astype(np.float64)
    if not isinstance(scorer, Method):
        raise BadSetting("scorers", scorer, "methods, embeddings or influences by name")
    return scorer.attribute(run, queries, out=out).total()[:, -1].astype(np.float64)
