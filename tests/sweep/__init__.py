"""Tests of `backtrail.sweep`."""
