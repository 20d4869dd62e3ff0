"""Retraining with changed sample weights: the ground truth that influence is compared with."""
