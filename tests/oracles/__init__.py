"""Slow, obvious versions of what backtrail computes fast."""
