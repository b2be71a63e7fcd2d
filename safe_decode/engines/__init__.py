"""Who runs the model: the interface of an engine, its rows, and one package an engine.

Knows what a row asks for and what is told of it. Does not know HTTP.
"""
