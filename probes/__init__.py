"""The workbench: how a probe bundle comes to be."""
