"""Data Value Embedding beside what it approximates."""

from pathlib import Path

import numpy as np
import pytest

import whence
from tests.methods.test_dit import recorded
from tests.methods.test_exact import asked

WHOLE = {"rank": 1000, "layers": "together"}  # an orthonormal projection of that rank is none


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("name", ["sgd"])
def test_at_full_rank_it_is_the_sweep_with_the_empirical_fisher(name: str, tmp_path: Path) -> None:
    """For plain gradient descent, at every observed state."""
    run = recorded(name, tmp_path)
    states = [2, run.steps]
    truth = whence.DIT(curvature=whence.EmpiricalFisher()).attribute(run, asked(), observed_at=states).values()
    method = whence.DataValueEmbedding(fisher="empirical", **WHOLE)  # type: ignore[arg-type]
    assert relative(method.attribute(run, asked(), observed_at=states).values(), truth) <= 1e-8
