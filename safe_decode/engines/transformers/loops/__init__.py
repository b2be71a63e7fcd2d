"""Decoding loops under the guard: step by step, judged when whole, and a user's own.

Knows one call of `generate` from its first forward to its last. Does not know prompts as text,
bundles or traces.
"""
