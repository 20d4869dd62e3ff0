"""Measurements: ratios inside one run, never absolute times, because machines are shared and noisy."""
