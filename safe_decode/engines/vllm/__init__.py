"""The guard inside vLLM: a plugin that reads, judges and forces where the engine itself decodes.

`plugin` is what vLLM loads; everything else follows from the configuration that it changes.
"""
