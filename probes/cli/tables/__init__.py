"""What commands of the workbench print: figures, facts, located units and attacks, as tables."""
