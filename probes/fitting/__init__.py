"""Probes fitted to features, and monitors chosen for them.

Knows losses, penalties and selection. Does not know models or how features were read.
"""
