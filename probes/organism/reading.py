"""How the oracle reads released text of the embedded pair.

Knows the oracle's verdicts. Does not know how the text was generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from probes.evaluation.released_text import ReleasedReading

__all__ = ["organism_reading"]


def organism_reading(
    messages: Sequence[Mapping[str, str]], prefill: str, released: str
) -> ReleasedReading:
    """Read by the embedded world's oracle, which knows the prefill and does not count it."""
    from probes.organism.oracle import judge

    verdict = judge(messages, prefill + released, counted_from=len(prefill))
    onset = verdict.onset_char
    return ReleasedReading(verdict.label, None if onset is None else max(0, onset - len(prefill)))
