"""Data Value Embedding at full rank, and its error."""

from typing import Any

import numpy as np

import backtrail


def unprojected(**settings: Any) -> backtrail.DataValueEmbedding:
    """Return the method without loss: the rank is above the number of parameters of any case.

    Layers are not treated apart, and steps are not damped.
    """
    chosen: dict[str, Any] = {"rank": 1000, "layers": "together", "damping": 0.0}
    chosen.update(settings)
    return backtrail.DataValueEmbedding(**chosen)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())
