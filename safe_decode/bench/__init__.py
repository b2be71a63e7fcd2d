"""What `safe-decode bench` runs: what the guard costs, measured beside the bare model."""
