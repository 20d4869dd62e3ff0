"""Walks through a recorded training: backward, forward, and again with other weights."""
