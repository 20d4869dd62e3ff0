"""Settings of all tests.

This file is read before the shape checks are switched on, so it must not import backtrail.
"""

import random

import numpy as np
import pytest
import torch

# Two workers share the cores: more threads would only make them wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed all random generators before every test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
