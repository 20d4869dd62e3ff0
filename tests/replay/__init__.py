"""Tests of whence.replay."""
