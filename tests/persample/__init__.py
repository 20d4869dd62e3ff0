"""Tests of `backtrail.persample`."""
