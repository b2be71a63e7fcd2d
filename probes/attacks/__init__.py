"""Attacks on a deployed guard: four threat models with budgets, judged by what was released.

    T1  black box     queries alone: framings, prefills, filler, burial, turns, encodings, loops
    T2  surrogate     the model's weights, and a probe that the attacker fitted
    T3  white box     weights, threshold and redirect; a text suffix
    T4  soft prompt   the same with free vectors: a bound on what text could do, no text attack

    behaviours --search--> candidates --deployment--> sampled, released text --judge--> success

Everything here searches over tokens or vectors against one's own model and probe, so that a
detector is published with what it costs to get around it. What may be claimed from it is a
cost under a budget, never robustness.
"""
