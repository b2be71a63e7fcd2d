"""The server: OpenAI- and Anthropic-shaped endpoints in front of a guarded model, and a page.

Nothing is imported here; it needs the extra `serving`.
"""
