"""Random influence, and its sums by loops."""

from pathlib import Path

import numpy as np

from backtrail.influence.influence import Influence
from backtrail.influence.layout import Description
from backtrail.influence.writer import from_arrays

QUERIES = ("loss a", "loss b", "größe")
OBSERVED = (0, 3, 7, 10)
STEPS = 11
SLOTS = 4
SAMPLES = 9


def description(**changes: object) -> Description:
    """Describe the influence that these tests use, with some fields changed."""
    fields: dict[str, object] = {
        "method": "made",
        "unit": "nats",
        "denominator": "keep",
        "run": "run-1",
        "queries": QUERIES,
        "observed_at": OBSERVED,
        "steps": STEPS,
        "slots": SLOTS,
        "samples": SAMPLES,
        "shard": 4,
        "settings": {"seed": 3, "curvature": "Hessian"},
    }
    return Description(**{**fields, **changes})  # type: ignore[arg-type]


def slots(seed: int = 0) -> np.ndarray:
    """Draw batches: one with a sample twice, two short ones, samples 7 and 8 in none."""
    sample = np.random.default_rng(seed).integers(0, 7, size=(STEPS, SLOTS))
    sample[0, :2] = 5
    sample[4, 2:] = -1
    sample[10, 1:] = -1
    return sample


def numbers(seed: int = 0, about: Description | None = None) -> np.ndarray:
    """Draw influence, zero from the observed state on and in the padding."""
    about = about or description()
    values = np.random.default_rng(seed).normal(size=about.shape)
    for column, state in enumerate(about.observed_at):
        values[:, column, state:] = 0
    return values * (slots() >= 0)


def losses() -> np.ndarray:
    """Return losses `[step, slot]`, of which that of the last slot is unknown."""
    loss = np.arange(STEPS * SLOTS, dtype=np.float64).reshape(STEPS, SLOTS)
    loss[:, -1] = np.nan
    return loss


def made(path: Path | None = None, *, dtype: str = "float64") -> Influence:
    """Make the influence of these tests, in memory or in a folder."""
    values = numbers().astype(dtype)
    return from_arrays(description(), values, sample=slots(), loss=losses(), path=path)


def summed(start: int = 0, stop: int = STEPS) -> np.ndarray:
    """Sum over the visits in steps [start, stop) by four loops, `[query, observed_at, sample]`."""
    values = numbers()
    sample = slots()
    result = np.zeros((len(QUERIES), len(OBSERVED), SAMPLES))
    for q in range(len(QUERIES)):
        for o, state in enumerate(OBSERVED):
            for t in range(start, min(stop, state)):
                for b in range(SLOTS):
                    if sample[t, b] >= 0:
                        result[q, o, sample[t, b]] += values[q, o, t, b]
    return result
