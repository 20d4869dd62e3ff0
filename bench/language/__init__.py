"""Language models beside two libraries for them: one training, the same data, order and weights for all three."""
