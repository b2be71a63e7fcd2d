"""Conversations on disk and in memory: formats, public sets, duplicates, splits.

Knows texts and labels. Does not know models or probes.
"""
