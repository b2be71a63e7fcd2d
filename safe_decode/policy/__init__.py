"""What follows an alarm: trip or clear, redirect, hold-back, thresholds inside reasoning.

Knows decisions as values and rules. Does not know how models run, tensors of batches or files.
"""
