"""Diff-In (arXiv 2508.14648): influence from a few states of a training."""
