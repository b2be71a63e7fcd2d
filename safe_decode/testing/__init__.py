"""Tiny random models and bundles for them, for tests and benchmarks; nothing is downloaded.

Knows families of models and thresholds that make some rows trip. No other package of the runtime
imports it.
"""
