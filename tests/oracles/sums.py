"""Sums of influence over slots, entry by entry."""

import numpy as np

from backtrail.run.run import Run


def sum_by_sample(slots: np.ndarray, run: Run) -> np.ndarray:
    """Sum influence `[query, step, slot]` over all slots that hold a sample, `[query, sample]`."""
    total = np.zeros((len(slots), run.samples))
    for step in run.log:
        for slot, sample in enumerate(step.samples):
            total[:, sample] += slots[:, step.index, slot]
    return total
