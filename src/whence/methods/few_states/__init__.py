"""Diff-In: influence from a few states."""
