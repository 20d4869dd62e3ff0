"""A training problem (model, data, loss) as pure functions of a dict of tensors."""
