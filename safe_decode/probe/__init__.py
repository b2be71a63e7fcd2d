"""Probes: from features [batch, F] to one logit a head, [batch, K].

Knows weights and the sites that they read. Does not know hooks, thresholds or how a probe is
fitted.
"""
