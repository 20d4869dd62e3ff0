"""Sums over samples, rankings and tables of influence: pure functions on arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix

from backtrail import arguments
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
    samples = sample.ravel()
    columns = np.flatnonzero(samples >= 0)
    seen, rows = np.unique(samples[columns], return_inverse=True)
    # Only the samples of this block get a row, so the matrix is never larger than the block.
    ones = np.ones(len(columns))
    one_hot = csr_matrix((ones, (rows, columns)), shape=(len(seen), len(samples)))
    for totals, values in zip(into, block, strict=True):
        flat = values.reshape(len(values), -1)  # [observed_at, step x slot]
        totals[:, seen] += (one_hot @ flat.T).T


def ranking(scores: Float[np.ndarray, " sample"], order: Order) -> Int[np.ndarray, " rank"]:
    """Positions of the samples, the most harmful, helpful or influential first.

    Equal samples are ordered by position; NaN comes last.

    >>> ranking(np.array([1.0, -3.0, 2.0, -3.0]), "harmful").tolist()
    [1, 3, 0, 2]
    >>> ranking(np.array([1.0, -3.0, 2.0, -3.0]), "absolute").tolist()
    [1, 3, 2, 0]
    """
    keys = {"harmful": scores, "helpful": -scores, "absolute": -np.abs(scores)}
    return np.argsort(keys[order], kind="stable")


def places(ids: Int[np.ndarray, " sample"], samples: Sequence[int]) -> list[int]:
    """Positions of some samples among all.

    >>> places(np.array([3, 10, 500]), [500, 3])
    [2, 0]

    Args:
        ids: All samples, ascending.
        samples: The samples to look up.

    Raises:
        BadSetting: The samples are not whole numbers.
        UnknownSample: There is no such row.
        UnknownId: There is no such id.
    """
    numbers = arguments.whole_numbers(
        "samples", samples, least=None, expected="whole numbers", empty=True
    )
    # Numbers beyond the range of int64 are no samples; -1 is none either.
    comparable = [number if abs(number) < 2**63 else -1 for number in numbers]
    positions = np.searchsorted(ids, np.array(comparable, dtype=np.int64))
    for sample, position in zip(numbers, positions, strict=True):
        if position == len(ids) or ids[position] != sample:
            # Row numbers are 0 … N-1; anything else is an id.
            are_rows = len(ids) == 0 or ids[-1] == len(ids) - 1
            if are_rows:
                raise UnknownSample(sample, len(ids))
            raise UnknownId(sample, ids.tolist())
    return [int(position) for position in positions]


def top_table(
    scores: Float[np.ndarray, " sample"], ids: Int[np.ndarray, " sample"], *, k: int, order: Order
) -> pl.DataFrame:
    """Table of the first k samples of a ranking: rank (from 1), sample, influence."""
    first = ranking(scores, order)[:k]
    ranks = np.arange(1, len(first) + 1)
    return pl.DataFrame({"rank": ranks, "sample": ids[first], "influence": scores[first]})


def curve_table(observed_at: Sequence[int], totals: Float[np.ndarray, " state"]) -> pl.DataFrame:
    """Table of a sample's total influence by observed state, from state 0, where it is zero.

    >>> curve_table([10, 20], np.array([0.5, -0.25])).rows()
    [(0, 0.0), (10, 0.5), (20, -0.25)]
    """
    table = pl.DataFrame({"observed_at": list(observed_at), "influence": totals})
    if observed_at[0] == 0:
        return table
    start = pl.DataFrame({"observed_at": [0], "influence": [0.0]})
    return pl.concat([start, table])


def long_table(
    block: Float[np.ndarray, "query observed_at step slot"],
    sample: Int[np.ndarray, "step slot"],
    *,
    start: int,
    queries: Sequence[str],
    observed_at: Sequence[int],
) -> pl.DataFrame:
    """Table of a block with one row per number: query, observed_at, step, slot, sample, influence.

    Padding, and the steps from an observed state on, have no rows.

    Args:
        block: Influence at some steps.
        sample: The sample in every slot of these steps; -1 is padding.
        start: The first of these steps.
        queries: Name of each query.
        observed_at: Each observed state.
    """
    states = np.array(observed_at)
    steps = np.arange(start, start + len(sample))
    is_before_state = steps[:, None] < states[:, None, None]  # [observed_at, step, 1]
    is_real = (sample >= 0) & is_before_state
    query, state, step, slot = np.nonzero(np.broadcast_to(is_real, block.shape))
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
