"""Tests of `backtrail.methods.gradient_dot`."""
