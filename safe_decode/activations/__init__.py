"""Where and how activations are read: sites, a model's architecture, taps on its modules.

    sites --hooks--> features [batch, F], one row a forward

Knows modules, hooks and buffers. Does not know probes, thresholds, or who asks for features.
"""
