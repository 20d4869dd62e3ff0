"""What can be read off an influence: patterns of samples, regimes of a training."""
