"""A model's own responses to requests, generated, resumed and judged.

Knows how responses come about and what a judge says of them. Does not know activations.
"""
