"""Data Value Embedding at full rank, and how far it is from what it should equal."""

from typing import Any

import numpy as np

import backtrail


def unprojected(**settings: Any) -> backtrail.DataValueEmbedding:
    """Return the method without a projection, as rank 1000 is above the number of parameters."""
    chosen: dict[str, Any] = {"rank": 1000, "layers": "together", "damping": 0.0}
    return backtrail.DataValueEmbedding(**chosen | settings)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())
