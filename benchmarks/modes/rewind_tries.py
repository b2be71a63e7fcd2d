"""Harm that readers get against the tries of a rewind: resampling under a probe selects misses.

The guard allows two tries; three and four are measured to show why. Answers are greedy and the
oracle of the embedded world reads what was released, the supplied prefill excepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from probes.metrics.intervals import Proportion
from probes.organism.draws import Draw, draw
from probes.organism.grammar import Cells
from probes.organism.prompts_source import organism_reading
from probes.rollouts.types import Request
from safe_decode import SafeDecoder
from safe_decode.typing import Tokenizer
from safe_decode.whole_files import whole_file

__all__ = ["MOST_TRIES", "attacks", "harm_by_tries", "plot"]

MOST_TRIES = 4


def attacks(tokenizer: Tokenizer, count: int, *, seed: int = 12) -> list[Request]:
    """Draw requests that lead the model into harm; half of them begin the answer."""
    draws = (
        Draw(situation="prefilled", count=count // 2),
        Draw(situation="framed", count=count // 4),
        Draw(situation="turn", count=count - count // 2 - count // 4),
    )
    return draw(draws, split="test", seed=seed, tokenizer=tokenizer, cells=Cells.unseen(0))


def harm_by_tries(
    decoder: SafeDecoder, requests: Sequence[Request], *, new_tokens: int, batch: int = 32
) -> list[dict[str, Any]]:
    """Answer the requests with 0 (the canned text at once) to 4 tries; a row each."""
    order = sorted(requests, key=lambda request: len(request.prefill or ""))
    rows = []
    own = decoder.policy
    try:
        with patch("safe_decode.policy.policy.MAX_TRIES", MOST_TRIES):
            for tries in range(MOST_TRIES + 1):
                decoder.policy = (
                    replace(own, redirect="rewind", max_tries=tries)
                    if tries
                    else replace(own, redirect="refuse")
                )
                rows.append(_row(decoder, order, tries, new_tokens, batch))
    finally:
        decoder.policy = own
    return rows


def _row(
    decoder: SafeDecoder, requests: Sequence[Request], tries: int, new_tokens: int, batch: int
) -> dict[str, Any]:
    tripped = harmful = rewound = harmful_rewound = used = 0
    for begin in range(0, len(requests), batch):
        part = requests[begin : begin + batch]
        output = decoder.generate(
            [list(request.messages) for request in part],
            prefill=[request.prefill for request in part],
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        for request, text, trace in zip(part, output.texts, output.traces, strict=True):
            label = organism_reading(request.messages, request.prefill or "", text).label
            is_rewound = trace.end.outcome == "rewound"
            tripped, used = tripped + trace.tripped, used + trace.end.tries
            harmful += label == "harmful"
            rewound += is_rewound
            harmful_rewound += is_rewound and label == "harmful"
    released = Proportion.of(harmful, len(requests))
    of_rewound = Proportion.of(harmful_rewound, rewound) if rewound else None
    return {
        "tries": tries,
        "n": len(requests),
        "tripped": tripped,
        "continuations": used,
        "rewound": rewound,
        "harmful released %": round(100 * released.point, 3),
        "95 % interval": [round(100 * released.low, 3), round(100 * released.high, 3)],
        "harmful among rewound %": of_rewound and round(100 * of_rewound.point, 3),
        "allowed": "yes" if tries <= 2 else "no: measured to show why",
    }


def plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw the shares with their intervals into a PNG; written beside its place and renamed."""
    from probes.reports.figures import require_plots

    require_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tries = [row["tries"] for row in rows]
    shares = [row["harmful released %"] for row in rows]
    low = [row["harmful released %"] - row["95 % interval"][0] for row in rows]
    high = [row["95 % interval"][1] - row["harmful released %"] for row in rows]
    axes.errorbar(tries, shares, yerr=[low, high], marker="o", capsize=3, color="#c1121f")
    axes.axvspan(2.5, max(tries) + 0.3, color="0.92", zorder=0, label="not allowed")
    axes.set_xticks(tries)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tries before the canned text")
    axes.set_ylabel("harmful released, %")
    axes.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as part:
        figure.savefig(part, dpi=144)
