"""From a request's body to rows, or to a refusal that names what is wrong.

Knows what a client may ask for and how it may tighten the guard. Does not know how rows run.
"""
