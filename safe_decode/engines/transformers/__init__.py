"""The engine around transformers' `generate`: `SafeDecoder` and all that it needs.

Knows calls, options, loops, rewinds and returned objects. Does not know servers or commands.
"""
