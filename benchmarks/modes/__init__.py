"""What the guard promises of every mode of `generate`, measured: `python -m benchmarks.modes`."""
