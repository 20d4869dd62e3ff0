"""What is known of optimizers: their rules, and the derivatives of their updates."""
