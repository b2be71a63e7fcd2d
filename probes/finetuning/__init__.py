"""Fine-tuning while chosen weights hold still.

Knows which weights a unit owns, and training. Does not know probes.
"""
