"""Ground truth: trainings run again with changed weights of samples."""
