"""Tests of `backtrail.accel`."""
