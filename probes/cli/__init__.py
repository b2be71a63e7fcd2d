"""The commands of the workbench, one module a command.

They register with `safe-decode` as entry points. Their modules import nothing heavy at the top.
"""
