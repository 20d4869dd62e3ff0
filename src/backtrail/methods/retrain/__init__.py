"""Ground truth: training again without some samples."""
