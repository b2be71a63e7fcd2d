"""Micro-benchmarks of each stage: `python -m pytest benchmarks/cost/micro`."""
