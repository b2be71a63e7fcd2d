"""What the steps of the workbench cost."""
