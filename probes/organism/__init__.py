"""The embedded pair: a small world's grammar, its oracle, and the training of two models on it."""
