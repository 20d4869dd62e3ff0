"""Fixtures of the tests of Diff-In."""

from typing import Any

import pytest


@pytest.fixture(params=["published", "corrected"])
def form(request: pytest.FixtureRequest) -> Any:
    """Both forms of the method."""
    return request.param
