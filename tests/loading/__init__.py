"""Loading of models: what lies in a directory, and what is told before weights are read."""
