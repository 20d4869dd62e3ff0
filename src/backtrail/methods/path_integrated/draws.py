r"""The random weights of every sample in every re-run: balanced over runs, stratified over weights.

A sample that is drawn in n of the K re-runs has the weights

.. math:: w = f^u, \qquad u = (\pi_i + v_i) / n, \qquad i = 0 \dots n - 1

there, with f the floor, :math:`\pi` a random order of 0 ... n-1 (one stratum for each draw, a Latin
hypercube) and :math:`v_i` uniform in (0, 1). In the others it keeps the weight 1.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float64, Int64

from backtrail.errors import BadSetting
from backtrail.sampling import uniforms

# Of runs * share, which need not be a whole number exactly where it is one on paper.
ROUNDING = 1e-9


@final
@dataclass(frozen=True, slots=True)
class Draws:
    """The weights of all samples in all re-runs.

    Attributes:
        weights: of every sample; 1 where it is not drawn.
        drawn: whether the sample's weight is drawn in the re-run.
    """

    weights: Float64[np.ndarray, "run sample"]
    drawn: Bool[np.ndarray, "run sample"]

    @property
    def counts(self) -> Int64[np.ndarray, " sample"]:
        """In how many re-runs each sample is drawn; at least 1."""
        counts: np.ndarray = self.drawn.sum(axis=0)
        return counts


def check_share(runs: int, share: float) -> None:
    """Check that every sample can be drawn at least once.

    Raises:
        BadSetting: There are too few re-runs; the message says how many are needed.
    """
    if runs * share < 1 - ROUNDING:
        needed = math.ceil(1 / share - ROUNDING)
        reason = f"at least {needed} with share={share:g}, so that every sample is drawn"
        raise BadSetting("runs", runs, reason)


def draw_weights(samples: int, *, runs: int, floor: float, share: float, seed: int) -> Draws:
    """Draw the weights of all samples.

    Every sample is drawn in runs * share of the re-runs. Where that is no whole number, in as many
    rounded up or down, and so that the mean over samples is as near to it as possible.

    Args:
        samples: number of samples.
        runs: number of re-runs.
        floor: the smallest weight.
        share: of the re-runs in which a sample is drawn.
        seed: of all random choices.

    >>> draws = draw_weights(5, runs=4, floor=1e-3, share=0.5, seed=0)
    >>> draws.counts.tolist()
    [2, 2, 2, 2, 2]
    """
    fewest = math.floor(runs * share + ROUNDING)
    once_more = round(max(0.0, runs * share - fewest) * samples)
    counts = fewest + (_ranks(_keys(1, samples, seed=(seed, 0)).T)[:, 0] < once_more)
    # Each sample has a random order of the re-runs, and is drawn in the first ones.
    place_in_order = _ranks(_keys(runs, samples, seed=(seed, 1)))
    drawn = np.less(place_in_order, counts)
    # Keys are below 1, so what is not drawn has the last ranks.
    stratum = _ranks(np.where(drawn, _keys(runs, samples, seed=(seed, 2)), 2.0))
    within = _keys(runs, samples, seed=(seed, 3))
    u = (stratum + within) / counts
    return Draws(np.where(drawn, floor**u, 1.0), drawn)


def _keys(runs: int, samples: int, seed: tuple[int, int]) -> Float64[np.ndarray, "run sample"]:
    return uniforms(runs * samples, seed).reshape(runs, samples)


def _ranks(keys: Float64[np.ndarray, "run sample"]) -> Int64[np.ndarray, "run sample"]:
    """The rank of each key in its column, from 0."""
    return keys.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
