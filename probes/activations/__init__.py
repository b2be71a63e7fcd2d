"""Activations of finished responses, as probes are fitted and certified on them.

Knows teacher forcing, harvesting and features on disk. Does not know labels or losses.
"""
