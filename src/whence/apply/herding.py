r"""Choosing rows of a matrix so that those chosen stand for all: herding (Welling, 2009).

With vectors :math:`a_j`, of which k are wanted, the next one is that which brings their sum closest to its goal,

.. math:: j_{i+1} = \arg\min_{j} \Big\lVert \frac{i + 1}{N} \sum_{l} a_l - \sum_{l \le i} a_{j_l} - a_j \Big\rVert_2

so that after every choice the mean of the chosen is near the mean of all.
"""

import numpy as np
from jaxtyping import Float, Int64


def herded(vectors: Float[np.ndarray, "sample entry"], count: int) -> Int64[np.ndarray, " chosen"]:
    """Places of the first `count` rows, in the order in which herding takes them; of equals the first.

    >>> herded(np.array([[0.0], [1.0], [2.0], [9.0]]), 2).tolist()
    [2, 1]
    """
    sizes, mean = np.square(vectors).sum(axis=1), vectors.mean(axis=0)
    missing = np.zeros_like(mean)  # what the chosen lack to the mean of all
    free, chosen = np.ones(len(vectors), dtype=bool), np.zeros(count, dtype=np.int64)
    for place in range(count):
        missing += mean
        gap = np.where(free, sizes - 2 * (vectors @ missing), np.inf)
        chosen[place] = best = int(np.argmin(gap))
        free[best] = False
        missing -= vectors[best]
    return chosen


def quotas(sizes: Int64[np.ndarray, " group"], count: int) -> Int64[np.ndarray, " group"]:
    """How many of `count` every group may have: in proportion, what is left over to the largest remainders.

    >>> quotas(np.array([6, 3, 1]), 5).tolist()
    [3, 2, 0]
    """
    shares = sizes * count / sizes.sum()
    found: np.ndarray = np.floor(shares).astype(np.int64)
    rest = np.argsort(found - shares, kind="stable")[: count - int(found.sum())]
    found[rest] += 1
    return found
