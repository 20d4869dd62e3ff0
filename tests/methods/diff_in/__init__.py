"""Tests of `backtrail.methods.diff_in`."""
