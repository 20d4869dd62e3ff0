"""Tests of `backtrail.queries`."""
