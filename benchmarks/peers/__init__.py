"""Other ways to re-check while generating, from their descriptions, on the same tokens.

Each module builds one way as a `Run` of `safe_decode.bench.arms`, called where our guard is
called: after each forward, before the choice. They judge with random weights: what they say is
noise, what they cost is not. `python -m benchmarks.peers` runs them all in one interleaved run.
"""
