"""Studies of our own: what they measured stands in `results/` as JSON lines."""
