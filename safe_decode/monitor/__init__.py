"""The monitor: from a stream of logits to a statistic and an alarm, row by row.

Knows smoothing, scales and thresholds. Does not know activations, tokens or what follows an
alarm.
"""
