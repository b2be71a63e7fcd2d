"""Taps inside a traced forward, for models under `torch.compile`.

Knows how a module's forward is replaced, and the buffers that compiled graphs write. Does not
know what is read, or why.
"""
