"""Measurements: ratios within one run, not absolute times, since machines are shared and noisy."""
