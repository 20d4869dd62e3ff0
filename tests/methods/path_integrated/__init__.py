"""Tests of `backtrail.methods.path_integrated`."""
