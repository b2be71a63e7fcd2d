"""What the guard costs: a token, a first token, a stage, on one machine."""
