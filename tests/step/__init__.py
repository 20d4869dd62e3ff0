"""Tests of `backtrail.step`."""
