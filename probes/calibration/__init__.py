"""Certificates from benign responses, and whether live traffic still looks like them.

Knows statistics of finished responses. Does not know how a probe was fitted.
"""
