"""Tests of backtrail; the folders mirror src/backtrail."""
