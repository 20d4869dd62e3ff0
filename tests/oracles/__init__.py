"""Slow, obvious versions of what whence computes fast."""
