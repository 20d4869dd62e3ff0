"""From blocks of influence to sums per sample and tables; pure functions on arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix

from backtrail.errors import UnknownId, UnknownSample

Order = Literal["harmful", "helpful", "absolute"]
NO_VISITS = pl.DataFrame(
    schema={"step": pl.Int64, "slot": pl.Int64, "influence": pl.Float64, "loss": pl.Float64}
)


def add_by_sample(
    into: Float[np.ndarray, "query observed_at sample"],
    block: Float[np.ndarray, "query observed_at step slot"],
    sample: Int[np.ndarray, "step slot"],
) -> None:
    r"""Add the influence of each slot to that of the sample in it; padding (-1) adds nothing.

    .. math:: A_{q,\tau,j} \mathrel{+}= \sum_{t,b:\, S_t[b]=j} I_{q,\tau,t,b}

    The order of summation is that of steps and slots, so equal blocks give equal bits.

    >>> into = np.zeros((1, 1, 3))
    >>> add_by_sample(into, np.array([[[[1.0, 2.0], [4.0, 8.0]]]]), np.array([[0, 2], [2, -1]]))
    >>> into.tolist()
    [[[1.0, 0.0, 6.0]]]
    """
    flat = sample.ravel()
    real = np.flatnonzero(flat >= 0)
    seen, row = np.unique(flat[real], return_inverse=True)
    # Only the samples of this block get a row: what is held is never larger than the block.
    one_hot = csr_matrix((np.ones(len(real)), (row, real)), shape=(len(seen), len(flat)))
    for scores, values in zip(into, block, strict=True):
        scores[:, seen] += (one_hot @ values.reshape(len(values), -1).T).T


def ranking(scores: Float[np.ndarray, " sample"], order: Order) -> Int[np.ndarray, " rank"]:
    """Order samples, the most harmful, helpful or influential first; of equals the first row first.

    >>> ranking(np.array([1.0, -3.0, 2.0, -3.0]), "harmful").tolist()
    [1, 3, 0, 2]
    >>> ranking(np.array([1.0, -3.0, 2.0, -3.0]), "absolute").tolist()
    [1, 3, 2, 0]
    """
    keys = {"harmful": scores, "helpful": -scores, "absolute": -np.abs(scores)}
    return np.argsort(keys[order], kind="stable")


def places(ids: Int[np.ndarray, " sample"], samples: Sequence[int]) -> list[int]:
    """Where samples stand among all samples in order.

    >>> places(np.array([3, 10, 500]), [500, 3])
    [2, 0]

    Raises:
        UnknownSample: There is no such row.
        UnknownId: There is no such id.
    """
    found = np.searchsorted(ids, np.asarray(samples, dtype=np.int64))
    for sample, place in zip(samples, found, strict=True):
        if place == len(ids) or ids[place] != sample:
            numbered = len(ids) == 0 or ids[-1] == len(ids) - 1
            raise UnknownSample(sample, len(ids)) if numbered else UnknownId(sample, ids.tolist())
    return [int(place) for place in found]


def top_table(
    scores: Float[np.ndarray, " sample"], ids: Int[np.ndarray, " sample"], *, k: int, order: Order
) -> pl.DataFrame:
    """List the first k samples of a ranking: rank (from 1), sample, influence."""
    first = ranking(scores, order)[: max(k, 0)]
    ranks = np.arange(1, len(first) + 1)
    return pl.DataFrame({"rank": ranks, "sample": ids[first], "influence": scores[first]})


def curve_table(observed_at: Sequence[int], totals: Float[np.ndarray, " state"]) -> pl.DataFrame:
    """List a sample's total influence by observed state, from state 0, where it is zero.

    >>> curve_table([10, 20], np.array([0.5, -0.25])).rows()
    [(0, 0.0), (10, 0.5), (20, -0.25)]
    """
    table = pl.DataFrame({"observed_at": list(observed_at), "influence": totals})
    if observed_at[0] == 0:
        return table
    return pl.concat([pl.DataFrame({"observed_at": [0], "influence": [0.0]}), table])


def long_table(
    block: Float[np.ndarray, "query observed_at step slot"],
    sample: Int[np.ndarray, "step slot"],
    *,
    start: int,
    queries: Sequence[str],
    observed_at: Sequence[int],
) -> pl.DataFrame:
    """List every number of a block that a sample stands behind: no padding, no step after the state.

    Columns: query, observed_at, step, slot, sample, influence.
    """
    states = np.array(observed_at)
    steps = np.arange(start, start + len(sample))
    real = (sample >= 0) & (steps[:, None] < states[:, None, None])
    query, state, step, slot = np.nonzero(np.broadcast_to(real, block.shape))
    return pl.DataFrame(
        {
            "query": pl.Series(queries, dtype=pl.String).gather(query),
            "observed_at": states[state],
            "step": steps[step],
            "slot": slot,
            "sample": sample[step, slot],
            "influence": block[query, state, step, slot],
        }
    )
