"""What a bundle is worth: offline among its controls, and as it is served.

Knows methods side by side. Does not know how figures are drawn.
"""
