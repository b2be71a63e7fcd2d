"""Micro-benchmarks of each stage, kept by pytest-benchmark: `python -m pytest benchmarks/micro`."""
