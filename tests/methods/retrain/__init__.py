"""Tests of `backtrail.methods.retrain`."""
