"""Beside the training loop; write-only."""
