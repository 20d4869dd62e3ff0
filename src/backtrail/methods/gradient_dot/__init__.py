"""Gradient products without curvature: TracIn and GradientDot."""
