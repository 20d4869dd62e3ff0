r"""Embeddings of a training's visits: vectors whose inner products with queries are influences.

.. math:: I[q, \tau, t, b] = \langle \nabla q(\theta_\tau),\, e^{(\tau)}_{t,b} \rangle

Both sides are in the small space of a projection, and the vectors are made before any query is
known. A training may be cut into stretches at the observed states: a vector leads to the end of its
own stretch, and a query gradient is carried back over the stretches behind it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final, get_args

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from backtrail import arguments
from backtrail.errors import BadSetting, EmbeddedElsewhere, NotEmbedded, NotFinite
from backtrail.exclusive import exclusive
from backtrail.influence.influence import Influence
from backtrail.influence.tables import Order, ranking
from backtrail.influence.writer import InfluenceWriter
from backtrail.methods.dve.projection import Projection, projection_for
from backtrail.methods.dve.store import About, EmbeddingStore
from backtrail.methods.observe import (
    ObservedAt,
    check_queries,
    check_run,
    observed_states,
    query_gradients,
    trained_samples,
)
from backtrail.methods.result import begin_or_resume, describe
from backtrail.queries import Averaged, Query
from backtrail.queries.subset import QuerySubset
from backtrail.run.run import Run

# Whole query gradients that are in memory at once.
GRADIENT_BYTES = 256 * 2**20
# Summed embeddings of samples that are in memory at once.
SUM_BYTES = 256 * 2**20


def open_embeddings(path: str | os.PathLike[str], run: Run) -> "Embeddings":
    """Open the folder of finished embeddings of a run.

    Args:
        path: The folder.
        run: The run that they were made from.

    Raises:
        UnfinishedEmbeddings: The embedding was interrupted.
        EmbeddedElsewhere: The embeddings are of another run.
        DamagedEmbeddings: A file is missing, or of another size.
    """
    folder = arguments.path("path", path)
    check_run(run)
    store = EmbeddingStore.open(folder)
    if store.about.run != run.id:
        raise EmbeddedElsewhere(store.path, store.about.run, run.id)
    return Embeddings(run, store)


def refuse_averaged(queries: Query) -> None:
    """Refuse queries of averaged weights, whose derivative needs the states on the way.

    Raises:
        BadSetting: The queries read averages of the weights.
    """
    if isinstance(queries, Averaged):
        expected = "queries that are not Averaged; backtrail.DIT supports averages"
        raise BadSetting("queries", queries, expected)


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """A vector for every visit: the projected change of the weights by removing it.

    Source: Data Value Embedding, Wang et al., arXiv 2412.09538.

    Attributes:
        run: The training.
    """

    run: Run
    _store: EmbeddingStore

    @property
    def about(self) -> About:
        """Everything but the numbers."""
        return self._store.about

    @property
    def observed_at(self) -> tuple[int, ...]:
        """States that the embeddings lead to, ascending."""
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
        """The projection, drawn again from its seed."""
        settings = self.about.settings
        return projection_for(
            self.run.task,
            self.run.manifest,
            kind=settings["projection"],  # type: ignore[arg-type]
            rank=settings["rank"],  # type: ignore[arg-type]
            seed=settings["seed"],  # type: ignore[arg-type]
        )

    def values(
        self, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "step slot coordinate"]:
        """Vectors of the visits in steps [start, stop), each towards the next observed state.

        Raises:
            ImpossibleWindow: It is not 0 <= start <= stop <= steps.
        """
        steps = self.about.steps
        last = steps if stop is None else stop
        start, stop = arguments.step_range("(start, stop)", (start, last), steps)
        return self._store.read("embedding", start, stop)

    @exclusive
    def attribute(
        self, queries: Query, *, observed_at: ObservedAt = "end", out: str | Path | None = None
    ) -> Influence:
        """Influence of every visit on the queries, `[query, observed_at, step, slot]`.

        Sign: what the query gains when the sample is removed; for a loss, positive is helpful,
        negative harmful. The unit is that of the queries.

        Args:
            queries: What is asked.
            observed_at: The states that the queries read, among those that the embeddings lead to.
            out: Folder of the result. An unfinished attribution of the same question there is
                resumed and gives bit-identical results. None keeps the result in memory.

        Raises:
            BadSetting: The queries read averages of the weights.
            NotEmbedded: The embeddings do not lead to a state.
        """
        check_queries(queries)
        refuse_averaged(queries)
        path = arguments.folder_or_none("out", out)
        states = observed_states(self.run, observed_at)
        missing = sorted(set(states) - set(self.observed_at))
        if missing:
            raise NotEmbedded(missing, self.observed_at)
        description = describe(
            self.run,
            queries,
            states,
            method="DataValueEmbedding",
            settings=dict(self.about.settings) | {"exact": False},
        )
        writer = begin_or_resume(self.run, description, path, queries=queries)
        if len(writer.done) < len(writer.shards):
            self._fill(writer, queries)
        return writer.finish().with_queries(queries)

    @exclusive
    def top(self, queries: Query, k: int = 10, *, order: Order = "harmful") -> pl.DataFrame:
        """List the most influential samples of every query, seen from the final state.

        The matrix [query, sample] is never materialised.

        Args:
            queries: What is asked.
            k: How many samples for each query.
            order: "harmful" (most negative first), "helpful" (most positive first) or "absolute".

        Returns:
            A table with the columns query, rank, sample and influence.

        Raises:
            BadSetting: An argument has an invalid value.
            NotFinite: Some influence is NaN or infinite.
        """
        check_queries(queries)
        refuse_averaged(queries)
        k = arguments.whole("k", k, least=1)
        arguments.choice("order", order, get_args(Order))
        query_vectors = self._query_vectors(queries, self.run.steps)
        best = [pl.DataFrame()] * len(queries.names)
        for ids, summed in self._summed(self.run.ids):
            scores = (query_vectors @ summed.T).double().cpu().numpy()
            bad = ids[~np.isfinite(scores).all(axis=0)]
            if len(bad):
                raise NotFinite(bad.tolist())
            for place, row in enumerate(scores):
                block = pl.DataFrame({"sample": ids, "influence": row})
                candidates = pl.concat([best[place], block], how="diagonal")
                best[place] = _ranked(candidates, k, order)
        tables_by_query = []
        for name, table in zip(queries.names, best, strict=True):
            tables_by_query.append(table.select(pl.lit(name).alias("query"), pl.all()))
        return pl.concat(tables_by_query)

    @exclusive
    def nearest(self, sample: int, k: int = 10) -> pl.DataFrame:
        """List the samples whose removal moves the final weights in the most similar direction.

        Similarity is the cosine of the embeddings, summed over all visits of a sample.

        Args:
            sample: Row number, or id.
            k: How many samples.

        Returns:
            A table with the columns sample and similarity, the most similar first.

        Raises:
            BadSetting: An argument has an invalid value.
            UnknownSample: There is no such row.
            UnknownId: There is no such id.
            NeverTrainedOn: The sample was in no batch.
        """
        # No more than there are: polars takes no number beyond 64 bits.
        k = min(arguments.whole("k", k, least=1), len(self.run.ids))
        sample = arguments.whole("sample", sample)
        trained_samples(self.run, [sample], "sample")
        _, own = next(self._summed(np.array([sample])))
        smallest = torch.finfo(own.dtype).tiny
        blocks = []
        for ids, summed in self._summed(self.run.ids[self.run.ids != sample]):
            lengths = (summed.norm(dim=1) * own.norm()).clamp_min(smallest)
            similarity = ((summed @ own[0]) / lengths).double().cpu().numpy()
            blocks.append(pl.DataFrame({"sample": ids, "similarity": similarity}))
        table = pl.concat(blocks)
        return table.sort("similarity", descending=True, maintain_order=True).head(k)

    @exclusive
    def summed(self) -> Float[np.ndarray, "sample coordinate"]:
        """Embeddings towards the end, summed over each sample's visits, ordered as `run.ids`."""
        return np.concatenate([summed.cpu().numpy() for _, summed in self._summed(self.run.ids)])

    def __repr__(self) -> str:
        """Sizes and settings in two lines."""
        about = self.about
        settings = ", ".join(f"{name}={value!r}" for name, value in about.settings.items())
        states = ", ".join(map(str, self.observed_at))
        sizes = f"{about.steps} steps x {about.slots} slots in {about.rank} coordinates"
        return (
            f"Embeddings of {sizes}, towards the states {states}\nby DataValueEmbedding({settings})"
        )

    def _query_vectors(self, queries: Query, state: int) -> Float[Tensor, "query coordinate"]:
        """Projected gradients of the queries at a state, a few at a time."""
        there = self.run.state(state, replay=True)
        projection = self.projection()
        gradient_bytes = sum(there.params[name].nbytes for name in self.run.trained)
        at_once = max(1, GRADIENT_BYTES // gradient_bytes)
        count = len(queries.names)
        parts = []
        for first in range(0, count, at_once):
            some = QuerySubset(queries, tuple(range(first, min(first + at_once, count))))
            by_parameter, _ = query_gradients(self.run, some, there)
            parts.append(projection.of_gradient(by_parameter))
        return torch.cat(parts)

    def _fill(self, writer: InfluenceWriter, queries: Query) -> None:
        """Score the shards that are not done, from the last step to the first."""
        description = writer.description
        done = writer.done
        block = np.zeros(())
        bar = tqdm(
            total=description.steps, desc="attributing", unit="step", disable=None, leave=False
        )
        for (first, stop), columns, vectors in self._stretches(queries, description.observed_at):
            for shard in reversed(range(len(description.shards))):
                start, end = description.shards[shard]
                # The part of the shard that lies in this stretch, if any.
                part_first = max(first, start)
                part_stop = min(stop, end)
                if part_first >= part_stop or shard in done:
                    continue
                if part_stop == end:
                    shape = (*description.shape[:2], end - start, description.slots)
                    block = np.zeros(shape)
                scores = self._scores(vectors, part_first, part_stop)
                block[:, columns, part_first - start : part_stop - start] = scores
                bar.update(part_stop - part_first)
                if part_first == start:
                    writer.write(start, block, self._store.read("loss", start, end))
                    writer.mark_done(shard)
        bar.close()

    def _scores(
        self, vectors: Float[Tensor, "state query coordinate"], first: int, stop: int
    ) -> Float[np.ndarray, "query state step slot"]:
        states, queries = vectors.shape[:2]
        result = np.zeros((queries, states, stop - first, self.about.slots))
        for start in range(first, stop, self.about.shard):
            embeddings = self.values(start, min(start + self.about.shard, stop))
            rows = torch.from_numpy(embeddings).to(vectors)
            steps, slots = rows.shape[:2]
            flat = vectors.flatten(0, 1) @ rows.flatten(0, 1).T
            scores = flat.view(states, queries, steps, slots).transpose(0, 1)
            result[:, :, start - first : start - first + steps] = scores.cpu().numpy()
        return result

    def _stretches(
        self, queries: Query, states: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, int], list[int], Float[Tensor, "state query coordinate"]]]:
        """Walk over the stretches from the last to the first.

        Yields:
            Steps [first, stop) of the stretch; the places of the observed states from its end on,
            the latest first; and the projected query gradients of those states, carried back to
            the end of the stretch.
        """
        columns: list[int] = []
        like = next(iter(self.run.state(self.run.kept[-1]).params.values()))
        vectors = like.new_zeros(0, len(queries.names), self.about.rank)
        ends = self.observed_at
        for place in reversed(range(len(ends))):
            if len(vectors) and place + 1 < len(ends):
                vectors = self._carried_back(place + 1, vectors)
            if ends[place] in states:
                here = self._query_vectors(queries, ends[place])
                vectors = torch.cat([vectors, here[None]])
                columns.append(states.index(ends[place]))
            first = ends[place - 1] if place else 0
            yield (first, ends[place]), columns, vectors

    def _carried_back(self, stretch: int, vectors: Tensor) -> Tensor:
        """Query gradients at the end of a stretch, taken back to its start."""
        parts = []
        for (start, stop), matrix in self._transport(stretch, vectors):
            parts.append(vectors[..., start:stop] @ matrix)
        return torch.cat(parts, dim=-1)

    def _carried_forward(self, stretch: int, rows: Tensor) -> Tensor:
        """Embeddings towards the start of a stretch, taken on to its end."""
        parts = []
        for (start, stop), matrix in self._transport(stretch, rows):
            parts.append(rows[..., start:stop] @ matrix.T)
        return torch.cat(parts, dim=-1)

    def _transport(self, stretch: int, like: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Coordinates of every block, and its matrix P over a stretch."""
        for number, coordinates in enumerate(self.about.blocks.values()):
            matrix = self._store.read(f"transport/{number}", stretch, stretch + 1)[0]
            yield coordinates, torch.from_numpy(matrix).to(like)

    def _summed(
        self, samples: Int64[np.ndarray, " sample"]
    ) -> Iterator[tuple[Int64[np.ndarray, " sample"], Float[Tensor, "sample coordinate"]]]:
        """Embeddings towards the end, summed over the visits of each sample.

        Yields:
            As many samples at once as fit, and their sums.
        """
        like = next(iter(self.run.state(self.run.kept[-1]).params.values()))
        at_once = max(1, SUM_BYTES // (8 * self.about.rank))
        for first in range(0, len(samples), at_once):
            some = samples[first : first + at_once]
            sums = like.new_zeros(len(some), self.about.rank)
            start = 0
            for stretch, end in enumerate(self.observed_at):
                for step in range(start, end, self.about.shard):
                    self._add_visits(
                        sums, some, range(step, min(step + self.about.shard, end)), stretch
                    )
                start = end
            yield some, sums

    def _add_visits(
        self, sums: Tensor, samples: Int64[np.ndarray, " sample"], steps: range, stretch: int
    ) -> None:
        """Add the embeddings of some steps of a stretch to the sums of their samples."""
        visited = self._store.read("sample", steps.start, steps.stop).ravel()
        # Place of every visited sample among those wanted; where it is not wanted, any place.
        place = np.searchsorted(samples, visited).clip(max=len(samples) - 1)
        wanted = np.flatnonzero(samples[place] == visited)
        embeddings = self.values(steps.start, steps.stop).reshape(-1, self.about.rank)
        rows = torch.from_numpy(embeddings[wanted]).to(sums)
        for later in range(stretch + 1, len(self.observed_at)):
            rows = self._carried_forward(later, rows)
        sums.index_add_(0, torch.from_numpy(place[wanted]).to(sums.device), rows)


def _ranked(candidates: pl.DataFrame, k: int, order: Order) -> pl.DataFrame:
    scores = candidates["influence"].to_numpy()
    chosen = ranking(scores, order)[:k]
    ranks = pl.Series("rank", np.arange(1, len(chosen) + 1))
    return candidates[chosen].select(ranks, "sample", "influence")
