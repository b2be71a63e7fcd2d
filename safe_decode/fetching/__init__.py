"""Bringing models and bundles to this machine, by name or address.

Knows hubs, package indexes and stores. Does not know generation.
"""
