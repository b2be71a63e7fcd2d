"""Groups of options that several commands of the workbench inherit, with what they stand for.

Knows options and the values they mean. Does not know commands.
"""
