r"""Embeddings of a training's visits: vectors that need no query, whose inner products with queries are influences.

.. math:: I[q, \tau, t, b] = \langle \nabla q(\theta_\tau),\, e^{(\tau)}_{t,b} \rangle

both in the small space of a projection. A training may be cut into stretches at the observed
states: a vector leads to the end of its own stretch, and a query gradient is taken back over the
stretches behind it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from backtrail.errors import BadSetting, EmbeddedElsewhere, NotEmbedded
from backtrail.exclusive import exclusive
from backtrail.influence import tables
from backtrail.influence.influence import Influence
from backtrail.influence.tables import Order
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.dve.projection import Projection, projection_for
from backtrail.methods.dve.store import About, EmbeddingStore
from backtrail.methods.observe import ObservedAt, observed_states, query_gradients
from backtrail.methods.result import begun_writer, described
from backtrail.queries import Averaged, Query
from backtrail.queries.subset import QuerySubset
from backtrail.run.run import Run

GRADIENT_BYTES = 256 * 2**20  # of whole query gradients at once
SUM_BYTES = 256 * 2**20  # of samples' summed embeddings at once


def open_embeddings(path: str | os.PathLike[str], run: Run) -> "Embeddings":
    """Open the folder of a finished embedding of this run.

    Raises:
        UnfinishedEmbeddings: it was interrupted.
        EmbeddedElsewhere: it is of another run.
    """
    store = EmbeddingStore.open(Path(path))
    if store.about.run != run.id:
        raise EmbeddedElsewhere(store.path, store.about.run, run.id)
    return Embeddings(run, store)


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """A vector for every visit of every sample: what its removal moves the weights by, in a small space.

    Attributes:
        run: the training.
    """

    run: Run
    _store: EmbeddingStore

    @property
    def about(self) -> About:
        """Everything but the numbers."""
        return self._store.about

    @property
    def observed_at(self) -> tuple[int, ...]:
        """States that they lead to."""
        return self.about.observed_at

    @property
    def path(self) -> Path | None:
        """The folder; None in memory."""
        return self._store.path

    @property
    def sample(self) -> Int64[np.ndarray, "step slot"]:
        """Row of the training set (or id) in every slot; -1 pads a short batch."""
        return self._store.read("sample")

    def projection(self) -> Projection:
        """The projection, drawn again."""
        told = self.about.settings
        chosen = {"kind": told["projection"], "rank": told["rank"], "seed": told["seed"]}
        return projection_for(self.run.task, self.run.manifest, **chosen)  # type: ignore[arg-type]

    def values(
        self, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "step slot coordinate"]:
        """The vectors of the visits in steps [start, stop), each towards the next observed state."""
        return self._store.read("embedding", start, stop)

    @exclusive
    def attribute(
        self, queries: Query, *, observed_at: ObservedAt = "end", out: str | Path | None = None
    ) -> Influence:
        """Influence of every visit on the queries, by inner products.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful.

        Args:
            queries: what is asked.
            observed_at: the states that the queries read, of those that the embeddings lead to.
            out: folder of the result. An unfinished attribution of the same question there is
                resumed, to the same bits. None keeps the result in memory.

        Raises:
            BadSetting: the queries read averages of the weights.
            NotEmbedded: the embeddings do not lead to a state.
        """
        if isinstance(queries, Averaged):
            raise BadSetting(
                "queries",
                queries,
                "queries of the weights themselves; backtrail.DIT answers for averages",
            )
        states = observed_states(self.run, observed_at)
        if missing := sorted(set(states) - set(self.observed_at)):
            raise NotEmbedded(missing, self.observed_at)
        about = described(self.run, queries, states)
        about = replace(
            about,
            method="DataValueEmbedding",
            settings=dict(self.about.settings) | {"exact": False},
        )
        writer = begun_writer(self.run, about, None if out is None else Path(out))
        if len(writer.done) < len(writer.shards):
            self._fill(writer, queries)
        return writer.finish().with_queries(queries)

    @exclusive
    def top(self, queries: Query, k: int = 10, *, order: Order = "harmful") -> pl.DataFrame:
        """List the most influential samples of every query, seen from the end: query, rank, sample, influence.

        The matrix of all queries and samples is never held.

        Args:
            queries: what is asked.
            k: how many samples for each.
            order: "harmful" (most negative first), "helpful" (most positive first) or "absolute".
        """
        asked, best = self._slopes(queries, self.run.steps), [pl.DataFrame()] * len(queries.names)
        for ids, summed in self._summed(self.run.ids):
            scores = (asked @ summed.T).double().cpu().numpy()
            for place, (old, row) in enumerate(zip(best, scores, strict=True)):
                new = pl.DataFrame({"sample": ids, "influence": row})
                best[place] = _ranked(pl.concat([old, new], how="diagonal"), k, order)
        named = zip(queries.names, best, strict=True)
        return pl.concat(
            [found.select(pl.lit(name).alias("query"), pl.all()) for name, found in named]
        )

    @exclusive
    def nearest(self, sample: int, k: int = 10) -> pl.DataFrame:
        """List the samples that moved the final weights in the most similar direction: sample, similarity.

        Similarity is the cosine of the embeddings, summed over all visits of a sample.
        """
        tables.places(self.run.ids, [sample])
        _, mine = next(self._summed(np.array([sample])))
        found = []
        for ids, summed in self._summed(self.run.ids[self.run.ids != sample]):
            sizes = (summed.norm(dim=1) * mine.norm()).clamp_min(torch.finfo(summed.dtype).tiny)
            similarity = ((summed @ mine[0]) / sizes).double().cpu().numpy()
            found.append(pl.DataFrame({"sample": ids, "similarity": similarity}))
        return pl.concat(found).sort("similarity", descending=True, maintain_order=True).head(k)

    @exclusive
    def summed(self) -> Float[np.ndarray, "sample coordinate"]:
        """Embeddings towards the end, summed over the visits of each sample, in the order of the run's `ids`."""
        return np.concatenate([summed.cpu().numpy() for _, summed in self._summed(self.run.ids)])

    def __repr__(self) -> str:
        """Sizes and settings in two lines."""
        told = ", ".join(f"{name}={value!r}" for name, value in self.about.settings.items())
        states = ", ".join(map(str, self.observed_at))
        return (
            f"Embeddings of {self.about.steps} steps x {self.about.slots} slots in {self.about.rank} coordinates, "
            f"towards the states {states}\nby DataValueEmbedding({told})"
        )

    def _slopes(self, queries: Query, state: int) -> Float[Tensor, "query coordinate"]:
        """Gradients of the queries at a state, projected, a few at a time."""
        there, small = self.run.state(state, replay=True), self.projection()
        size = sum(there.params[name].nbytes for name in self.run.trained)
        rows, count = max(1, GRADIENT_BYTES // size), len(queries.names)
        parts = []
        for first in range(0, count, rows):
            some = QuerySubset(queries, tuple(range(first, min(first + rows, count))))
            parts.append(small.of_gradient(query_gradients(self.run, some, there)[0]))
        return torch.cat(parts)

    def _fill(self, writer: InfluenceWriter, queries: Query) -> None:
        """Score the shards that are not done, from the last step to the first."""
        about, done = writer.description, writer.done
        block = np.zeros(())
        bar = tqdm(total=about.steps, desc="attributing", unit="step", disable=None, leave=False)
        for (first, stop), columns, vectors in self._asked(queries, about.observed_at):
            for shard in reversed(range(len(about.shards))):
                start, end = about.shards[shard]
                a, b = max(first, start), min(stop, end)
                if a >= b or shard in done:
                    continue
                if b == end:
                    block = np.zeros((*about.shape[:2], end - start, about.slots))
                block[:, columns, a - start : b - start] = self._scores(vectors, a, b)
                bar.update(b - a)
                if a == start:
                    writer.write(start, block, self._store.read("loss", start, end))
                    writer.mark_done(shard)
        bar.close()

    def _scores(
        self, vectors: Float[Tensor, "state query coordinate"], first: int, stop: int
    ) -> Float[np.ndarray, "query state step slot"]:
        found = np.zeros((vectors.shape[1], len(vectors), stop - first, self.about.slots))
        for start in range(first, stop, self.about.shard):
            rows = torch.from_numpy(self.values(start, min(start + self.about.shard, stop))).to(
                vectors
            )
            scores = (vectors.flatten(0, 1) @ rows.flatten(0, 1).T).view(
                *vectors.shape[:2], *rows.shape[:2]
            )
            found[:, :, start - first : start - first + len(rows)] = (
                scores.transpose(0, 1).cpu().numpy()
            )
        return found

    def _asked(
        self, queries: Query, states: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, int], list[int], Float[Tensor, "state query coordinate"]]]:
        """Every stretch from the last to the first, and what the queries are at its end, by places of the states."""
        columns: list[int] = []
        like = next(iter(self.run.state(self.run.kept[-1]).params.values()))
        vectors = like.new_zeros(0, len(queries.names), self.about.rank)
        ends = self.observed_at
        for place in reversed(range(len(ends))):
            if len(vectors) and place + 1 < len(ends):
                vectors = self._back(place + 1, vectors)
            if ends[place] in states:
                vectors = torch.cat([vectors, self._slopes(queries, ends[place])[None]])
                columns.append(states.index(ends[place]))
            yield (ends[place - 1] if place else 0, ends[place]), columns, vectors

    def _back(self, place: int, vectors: Tensor) -> Tensor:
        """Query gradients at the end of a stretch, taken back to its start."""
        return torch.cat(
            [vectors[..., a:b] @ matrix for (a, b), matrix in self._transport(place, vectors)], -1
        )

    def _forth(self, place: int, rows: Tensor) -> Tensor:
        """Embeddings towards the start of a stretch, carried on to its end."""
        return torch.cat(
            [rows[..., a:b] @ matrix.T for (a, b), matrix in self._transport(place, rows)], -1
        )

    def _transport(self, place: int, like: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for number, span in enumerate(self.about.blocks.values()):
            yield (
                span,
                torch.from_numpy(self._store.read(f"transport/{number}", place, place + 1)[0]).to(
                    like
                ),
            )

    def _summed(
        self, samples: Int64[np.ndarray, " sample"]
    ) -> Iterator[tuple[Int64[np.ndarray, " sample"], Float[Tensor, "sample coordinate"]]]:
        """Embeddings towards the end, summed over the visits of each sample; as many samples at once as fit."""
        like = next(iter(self.run.state(self.run.kept[-1]).params.values()))
        size, visited = max(1, SUM_BYTES // (8 * self.about.rank)), self.sample
        for first in range(0, len(samples), size):
            some = samples[first : first + size]
            sums = like.new_zeros(len(some), self.about.rank)
            start = 0
            for place, end in enumerate(self.observed_at):
                for a in range(start, end, self.about.shard):
                    b = min(a + self.about.shard, end)
                    row = np.searchsorted(some, visited[a:b].ravel()).clip(max=len(some) - 1)
                    real = np.flatnonzero(some[row] == visited[a:b].ravel())
                    rows = torch.from_numpy(
                        self.values(a, b).reshape(-1, self.about.rank)[real]
                    ).to(like)
                    for later in range(place + 1, len(self.observed_at)):
                        rows = self._forth(later, rows)
                    sums.index_add_(0, torch.from_numpy(row[real]).to(like.device), rows)
                start = end
            yield some, sums


def _ranked(found: pl.DataFrame, k: int, order: Order) -> pl.DataFrame:
    best = found["influence"].to_numpy()
    chosen = tables.ranking(best, order)[:k]
    return found[chosen].select(
        pl.Series("rank", np.arange(1, len(chosen) + 1)), "sample", "influence"
    )
