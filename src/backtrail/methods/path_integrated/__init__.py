"""Influence integrated over a sample's weight from 1 down to nearly 0, over several re-runs."""
