"""The commands of `safe-decode`, one module a kind.

The one room that sees both the runtime and the workbench. Its modules import nothing heavy
at the top, so that `safe-decode --help` answers at once.
"""
