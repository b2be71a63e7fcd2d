"""Whole paths from judged responses to a bundle, or to a part of one.

Knows the order of steps. Each step itself is another package's.
"""
