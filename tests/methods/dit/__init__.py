"""Tests of `backtrail.methods.dit`."""
