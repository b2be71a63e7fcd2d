"""The rows of one generation under the guard, whatever engine runs them.

Knows probe, monitor and policy step by step, trips, and what is kept of each row. Does not know
transformers, text or how a row's tokens are chosen.
"""
