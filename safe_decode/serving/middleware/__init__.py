"""What stands before every endpoint: keys, limits, sizes.

Knows a request's head. Does not know what is asked.
"""
