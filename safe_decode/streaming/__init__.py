"""Release to a reader: text as it may be shown, in typed events, while a call runs.

Knows detokenising, stop strings, the release rule and the threads that carry a stream. Does not
know models, scores or HTTP.
"""
