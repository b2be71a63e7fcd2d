"""The command line of the runtime: one module a command.

Its modules import nothing heavy at the top, so that `safe-decode --help` answers at once. Knows
no workbench: commands of other packages register themselves as entry points.
"""
