"""Tests of backtrail.influence."""
