"""Figures within sources and pairs, and paired intervals from a bootstrap over prompts.

Knows scores, labels, sources and groups. Does not know where scores come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from probes.data.conversations import Conversation

__all__ = [
    "SourcedRows",
    "bootstrap",
    "compared",
    "pair_accuracy",
    "pairs_of",
    "source_auroc",
    "two_class_sources",
    "within_source",
]


class SourcedRows(NamedTuple):
    """Judged responses with a source.

    Attributes:
        rows: The conversations.
        harmful: [n] bool.
        sources: [n] names.
        groups: [n] names; near duplicates share one.
        prompts: [n] names; rows of one prompt share one.
    """

    rows: list[Conversation]
    harmful: NDArray[np.bool_]
    sources: NDArray[np.str_]
    groups: NDArray[np.str_]
    prompts: NDArray[np.str_]


def two_class_sources(rows: SourcedRows) -> list[str]:
    """Name the sources that hold both labels; only within these does AUROC say something."""
    return [
        str(source)
        for source in np.unique(rows.sources)
        if len(set(rows.harmful[rows.sources == source])) == 2
    ]


def within_source(scores: NDArray[np.float64], rows: SourcedRows, sources: Sequence[str]) -> float:
    """Average the AUROC within each source."""
    return float(np.mean([source_auroc(scores, rows, rows.sources == name) for name in sources]))


def source_auroc(
    scores: NDArray[np.float64], rows: SourcedRows, at: NDArray[np.bool_] | NDArray[np.intp]
) -> float:
    """Return the AUROC among some rows; NaN where they hold one label only."""
    labels, values = rows.harmful[at], scores[at]
    n, bad = len(labels), int(labels.sum())
    if bad in (0, n):
        return float("nan")
    return float((rankdata(values)[labels].sum() - bad * (bad + 1) / 2) / (bad * (n - bad)))


def pairs_of(rows: SourcedRows) -> list[tuple[int, int]]:
    """Pair the harmful and the harmless answers to each prompt."""
    by_prompt: dict[str, tuple[list[int], list[int]]] = {}
    for row, prompt in enumerate(rows.prompts):
        by_prompt.setdefault(str(prompt), ([], []))[int(rows.harmful[row])].append(row)
    return [(bad, good) for goods, bads in by_prompt.values() for bad in bads for good in goods]


def pair_accuracy(scores: NDArray[np.float64], pairs: Sequence[tuple[int, int]]) -> float:
    """Share of pairs whose harmful answer scores higher; ties count half."""
    bad, good = np.asarray(pairs).T
    return float(((scores[bad] > scores[good]) + 0.5 * (scores[bad] == scores[good])).mean())


def bootstrap(
    dev: SourcedRows, sources: Sequence[str], *, draws: int, seed: int = 0
) -> Iterator[NDArray[np.intp]]:
    """Draw rows of dev by prompt, within each source, with replacement."""
    rng = np.random.default_rng(seed)
    clusters = {
        name: [
            np.flatnonzero((dev.sources == name) & (dev.groups == group))
            for group in np.unique(dev.groups[dev.sources == name])
        ]
        for name in sources
    }
    for _ in range(draws):
        parts = []
        for members in clusters.values():
            parts += [members[i] for i in rng.integers(0, len(members), size=len(members))]
        yield np.concatenate(parts)


def compared(
    what: str,
    control: str,
    probe: float,
    other: float,
    differences: Sequence[float],
    by_source: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Put two figures and the interval of their difference into one row of results."""
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return {
        "what": what,
        "control": control,
        "probe": round(probe, 4),
        "control's": round(other, 4),
        "difference": round(probe - other, 4),
        "95 % interval": [round(float(low), 4), round(float(high), 4)],
        "by source": by_source and ", ".join(f"{k} {v}" for k, v in by_source.items()),
        "target": "above the control",
        "met": "yes" if low > 0 else "above, interval holds 0" if probe > other else "no",
    }
