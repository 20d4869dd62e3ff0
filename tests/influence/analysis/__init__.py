"""Tests of `backtrail.influence.analysis`."""
