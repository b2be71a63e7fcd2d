"""What a reader sees of an answer that the guard ended before anything of it was shown.

Knows one sentence. Does not know why an answer ended: the sentence is the same for a trip and for
a guard that failed, so that it tells no more than the reason beside it does.
"""

from __future__ import annotations

__all__ = ["WITHHELD"]

WITHHELD = "The answer was withheld."
"""In place of nothing, which clients show as an empty turn and ask for again."""
