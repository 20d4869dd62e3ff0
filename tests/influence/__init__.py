"""Tests of whence.influence."""
