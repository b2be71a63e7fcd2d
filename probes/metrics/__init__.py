"""Figures and intervals: recall, false alarms, delay, comparisons of methods.

Knows numbers and labels. Does not know models, texts or where a score came from.
"""
