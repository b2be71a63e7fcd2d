"""Conversations and prompts as ids, and which of their positions are judged.

Knows chat templates and padding. Does not know models, probes or generation.
"""
