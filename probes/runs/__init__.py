"""Long runs: journals that go on where they stopped, progress, fixed protocols.

Knows files and identities. Does not know what is run.
"""
