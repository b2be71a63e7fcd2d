"""Rows of many requests in one batch: how a server's rows run on a decoder.

Knows a run from its rows to their last events. Does not know HTTP, queues or clients.
"""
