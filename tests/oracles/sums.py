"""Sums of influence over slots, entry by entry."""

import numpy as np

from backtrail.run.run import Run


def sum_by_sample(slots: np.ndarray, run: Run) -> np.ndarray:
    """Sum influence `[query, step, slot]` over all slots that hold a sample, `[query, sample]`."""
    found = np.zeros((len(slots), run.samples))
    for step in run.log:
        for place, sample in enumerate(step.samples):
            found[:, sample] += slots[:, step.index, place]
    return found
