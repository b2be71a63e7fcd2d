"""What an operator sees: the audit log, metrics, spans.

Knows counts and digests. Does not know prompts or completions, which are never logged.
"""
