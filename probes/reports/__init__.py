"""Pages and pictures of what was found.

Knows templates and axes. Does not know how a figure was measured.
"""
