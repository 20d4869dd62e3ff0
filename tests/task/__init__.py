"""Tests of `backtrail.task`."""
