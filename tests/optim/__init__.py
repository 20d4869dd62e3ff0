"""Tests of `backtrail.optim`."""
