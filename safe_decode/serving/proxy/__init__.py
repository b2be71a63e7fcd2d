"""The guarding proxy: what it asks of an upstream, and what of the answer reaches a reader.

Nothing is imported here; it needs the extra `serving`. The ASGI application itself is
`safe_decode.serving.proxy.middleware.SafetyMiddleware`.
"""
