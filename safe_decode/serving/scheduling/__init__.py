"""Rows in a queue, on an engine, and on their way back to their response.

Knows order, cancellation and what has become of each row. Does not know shapes of JSON.
"""
