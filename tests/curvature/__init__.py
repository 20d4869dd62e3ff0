"""Tests of `backtrail.curvature`."""
