"""The bundle: the one artefact that crosses from workbench to runtime.

Knows its files and digests, the fingerprint of a model, the canary, and scoring with NumPy alone.
Does not know how a bundle is fitted, or how rows are generated.
"""
