"""Bundles for other runtimes, and proof that they say the same.

Knows ONNX graphs and tolerances. Does not know how a bundle came to be.
"""
