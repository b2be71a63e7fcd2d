"""Does it matter who ends an answer? `python -m benchmarks.ends`."""
