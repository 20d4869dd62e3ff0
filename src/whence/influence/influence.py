"""The result of every method, read-only: an array on disk or in memory, and the questions it answers.

Nothing here holds the whole array: sums and tables walk over it shard by shard.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import polars as pl
import zarr
from jaxtyping import Float, Float64, Int64
from polars.io.plugins import register_io_source

from whence.errors import (
    ImpossibleWindow,
    NotObserved,
    TwoViewpoints,
    UnfinishedInfluence,
    UnknownQuery,
    UnknownSample,
)
from whence.extras import need
from whence.influence import layout, tables
from whence.influence.layout import Description
from whence.influence.tables import Order

if TYPE_CHECKING:
    import xarray

State = int | Literal["end"]


def open_influence(path: str | os.PathLike[str]) -> "Influence":
    """Open the folder of a finished attribution.

    Raises:
        UnfinishedInfluence: If it was interrupted.
    """
    folder = Path(path)
    group, description = layout.load(folder)
    done, shards = len(layout.done_shards(folder)), len(description.shards)
    if done < shards:
        raise UnfinishedInfluence(folder, done, shards)
    layout.check_files(folder)
    return Influence(group, description)


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Influence:
    r"""What each query gains when a sample is removed, by step of the removal and state of the query.

    .. math:: I[q, \tau, t, b] = -\partial q(\theta_\tau) / \partial w_{t,b}

    for a query q that reads the state τ (`observed_at`) and the weight w of the sample in slot b of
    step t. For a loss: positive = helpful, negative = harmful. Steps t >= τ have influence zero.

    >>> from whence.influence.writer import example
    >>> example()
    Influence by example: 2 queries [nats], seen from states 2, 4; 4 steps x 2 slots, 4 samples
    sign: what the query gains when the sample is removed; for a loss, positive = helpful, negative = harmful
    """

    _group: zarr.Group
    description: Description
    asked: object | None = None
