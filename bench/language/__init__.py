"""Language models beside two libraries for them: the same training, data, order and weights."""
