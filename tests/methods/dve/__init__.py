"""Tests of `backtrail.methods.dve`."""
