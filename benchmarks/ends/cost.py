"""What it costs that answers which somebody else ends are judged k tokens further.

Knows harmless requests, caps and clocks. Does not know attacks. Without a hold-back nothing is
judged further, so the same calls with k = 0 are the other arm of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.ends.readers import Ask, EndReader, Library
from probes.metrics.intervals import Proportion
from probes.organism.draws import Draw, draw
from probes.organism.grammar import Cells
from probes.rollouts.types import Request
from safe_decode import SafeDecoder
from safe_decode.bench.statistics import interval_of
from safe_decode.typing import Tokenizer

__all__ = ["CAPS", "cost_row", "harmless"]

CAPS = (8, 16, 32, 64, 160)
"""Of the calls; the last is the certified one."""


def harmless(tokenizer: Tokenizer, n: int, *, seed: int) -> list[Request]:
    """Draw ordinary requests, half of them hard negatives, as the certificate's were."""
    draws = (
        Draw(situation="benign", count=n // 2),
        Draw(situation="hard_negative", count=n - n // 2),
    )
    return draw(draws, split="test", seed=seed, tokenizer=tokenizer, cells=Cells.seen(0))


def cost_row(
    decoders: tuple[SafeDecoder, SafeDecoder], requests: Sequence[Request], cap: int, *, timed: int
) -> dict[str, Any]:
    """Count unseen tokens of calls with a cap, and time some of them alone.

    Args:
        decoders: As deployed, and without a hold-back.
        requests: Harmless ones.
        cap: New tokens.
        timed: How many calls are timed, in both arms, turn about.
    """
    asks = [Ask(request, "", cap) for request in requests]
    spent = [heard.spent for heard in Library(decoders[0]).hear(asks)]
    judged = [one.lookahead_tokens for one in spent if one.lookahead_tokens]
    share = Proportion.of(len(judged), len(asks))
    ours, without = _timed([Library(decoder) for decoder in decoders], asks[:timed])
    ratio = interval_of([a / b for a, b in zip(ours, without, strict=True)])
    return {
        "cap": cap,
        "n": len(asks),
        "answers with unseen tokens %": round(100 * share.point, 2),
        "95 % interval": [round(100 * share.low, 2), round(100 * share.high, 2)],
        "unseen tokens of such an answer, mean": round(fmean(judged), 2) if judged else None,
        "unseen tokens an answer, mean": round(sum(judged) / len(asks), 2),
        "tokens withheld": sum(one.withheld_tokens for one in spent),
        "ms a call": round(1000 * median(ours), 2),
        "ms without hold-back": round(1000 * median(without), 2),
        "extra ms a call": round(
            1000 * median(a - b for a, b in zip(ours, without, strict=True)), 2
        ),
        "ratio": [round(value, 3) for value in (ratio.point, *ratio.as_list(3))],
    }


def _timed(readers: Sequence[EndReader], asks: Sequence[Ask]) -> list[list[float]]:
    for reader in readers:
        reader.hear(asks[:1])
    taken: list[list[float]] = [[] for _ in readers]
    for number, ask in enumerate(asks):
        order = list(range(len(readers)))
        for place in order[number % 2 :] + order[: number % 2]:
            taken[place].append(_seconds(lambda p=place, a=ask: readers[p].hear([a])))  # type: ignore[misc]
    return taken


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
