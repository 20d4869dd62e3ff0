"""Fixtures of the tests of Diff-In."""

from typing import Any

import pytest


@pytest.fixture(params=["published", "corrected"])
def form(request: pytest.FixtureRequest) -> Any:
    """Run the test once for each form of the method."""
    return request.param
