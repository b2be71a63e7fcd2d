"""Bodies of requests, responses and errors, in OpenAI's and Anthropic's shapes.

Knows JSON as clients see it. Does not know engines, queues or policies.
"""
