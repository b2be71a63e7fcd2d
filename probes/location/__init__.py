"""Which units carry safety: importance, categories, random sets of equal size.

Knows activations by channel. Does not know probes or training.
"""
