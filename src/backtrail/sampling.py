r"""Random numbers that depend on a seed alone: the same on every version of torch.

torch's own streams may change between its releases, and did: `torch.multinomial` draws other labels
in other versions, which changes whatever is built on them. Here torch only gives the seed. The bits
come from numpy's Philox generator, whose raw output numpy keeps the same between releases; what is
made of them is written out below.

A sample of a distribution with the cumulative distribution function F is :math:`F^{-1}(u)`, with u
uniform in (0, 1).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtri
from torch import Tensor

# The random bits of a uniform number: (k + 1/2) / 2^52 is exact in float64 for every k below 2^52.
BITS = 52
# Rows of probabilities are worked on in chunks: with a vocabulary of 50,000 tokens the float64
# probabilities of a whole batch would take several times the memory of its logits.
ENTRIES_PER_CHUNK = 2**22


def uniforms(count: int, seed: int | Sequence[int]) -> Float[np.ndarray, " count"]:
    """Numbers of the open interval (0, 1), in float64.

    Args:
        count: how many.
        seed: any integer, or several integers of 0 or more.

    >>> uniforms(3, seed=0).tolist()
    [0.014067035665647709, 0.2577672456246177, 0.47156538101528966]
    """
    # Seeds that are hashes may be negative; numpy takes the same 64 bits without a sign.
    entropy = seed % 2**64 if isinstance(seed, int) else seed
    bits = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    # Half a step away from both ends, so that neither 0 nor 1 occurs: both have infinite quantiles.
    return np.asarray(((bits >> np.uint64(64 - BITS)) + 0.5) * 2.0**-BITS)


def uniforms_from(generator: torch.Generator, count: int) -> Float[np.ndarray, " count"]:
    """Numbers of (0, 1) that follow a generator of torch: it gives a seed of 124 bits and moves on.

    A generator that was seeded alike gives the same numbers on every version of torch; a generator
    of another kind of device gives others.
    """
    key = torch.randint(2**62, (2,), generator=generator, device=generator.device)
    return uniforms(count, key.tolist())


def sample_classes(
    logits: Float[Tensor, "row option"], generator: torch.Generator
) -> Int[Tensor, " row"]:
    r"""A class for every row of logits, with the probabilities that the logits give it.

    .. math:: y_b = \min \{c : u_b < \sum_{c' \le c} p_{b,c'}\}, \quad p_b = \mathrm{softmax}(z_b)

    >>> sample_classes(torch.tensor([[0.0, -torch.inf]] * 3), torch.Generator()).tolist()
    [0, 0, 0]
    """
    rows, classes = logits.shape
    uniform = torch.from_numpy(uniforms_from(generator, rows)).to(logits.device)
    found = torch.empty(rows, dtype=torch.long, device=logits.device)
    chunk = max(1, ENTRIES_PER_CHUNK // max(1, classes))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        found[part] = _inverse_cumulative(logits.detach()[part], uniform[part])
    return found


def _inverse_cumulative(
    logits: Float[Tensor, "row option"], uniform: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """The class at which the cumulative probability passes a uniform number, of every row."""
    probabilities = logits.double().softmax(1)
    # As whole numbers of 2^-52 the sums are exact, in whatever order a device adds them up. A class
    # of weight zero is never taken: the sum does not grow at it.
    weights = (probabilities * 2.0**BITS).round().long()
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1]
    # Rounded down, this is at most total - 1, because a uniform number is at most 1 - 2^-53.
    place = (uniform * total.double()).long()
    classes = torch.searchsorted(cumulative, place[:, None], right=True)[:, 0]
    # Logits that are not finite have no probabilities; any class will do, since the loss is NaN.
    return classes.clamp(max=logits.shape[1] - 1)


def sample_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers with the shape, type and device of a tensor."""
    normal = ndtri(uniforms_from(generator, like.numel()))
    return torch.from_numpy(normal).reshape(like.shape).to(like)


def sample_subset(total: int, count: int, seed: int) -> Int[Tensor, " count"]:
    """Different whole numbers below `total`, in ascending order, every set as likely as another.

    >>> sample_subset(5, 5, seed=3).tolist()
    [0, 1, 2, 3, 4]
    """
    order = np.argsort(uniforms(total, seed), kind="stable")
    return torch.from_numpy(np.sort(order[:count]))
