"""What happened to each row, on disk: the schema, its writing, and its replay.

Knows words, numbers and ids. Does not know models, tensors or engines.
"""
