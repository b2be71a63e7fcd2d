"""From the name of a model to a bundle that says what it is worth.

Knows recipes, what they need, and the order of the work. Each step itself is another package's.
"""
