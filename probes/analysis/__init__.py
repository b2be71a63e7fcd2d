"""Studies of a model: units removed, motives, directions, depth of alignment.

Knows interventions and what they change. Does not know bundles' files or commands.
"""
