"""Sources that a probe was not fitted on: `python -m benchmarks.real_text.left_out`.

For each of the four sources that hold both labels, the AUROC on its rows of *dev* of a probe that
was fitted on it too and of one that was fitted without it, both as deployed, beside words alone
(TF-IDF of the response's first tokens) fitted in the same two ways on the same rows.

Knows logits, texts and tables. Does not know models.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from benchmarks.card import aligned, card, write_results
from benchmarks.detection.reference import count_look
from benchmarks.real_text.candidates import TWO_CLASS, label_of
from benchmarks.real_text.harvest import fitted_rows
from benchmarks.real_text.parts import StudyRow
from benchmarks.real_text.study import TRIED, paths_of, peaks_at, read_scored
from benchmarks.real_text.workplace import parser_of

__all__ = ["main"]

LOG = logging.getLogger("benchmarks.real_text")
_READ = "heads and neurons that tell"
_CHARACTERS = 4
"""Of a token: words see about as much of a response as the probe does."""


def words_of(
    rows: Sequence[StudyRow], dev: Sequence[StudyRow], tokens: int, left_out: str | None
) -> NDArray[np.float64]:
    """Fit TF-IDF on the first tokens of responses, without one source, and score others."""
    used = [row for row in rows if row.part == "fit" and row.source != left_out]
    cut = tokens * _CHARACTERS
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, max_features=100_000),
        LogisticRegression(C=10.0, max_iter=300, class_weight="balanced"),
    )
    model.fit([row.conversation.response[:cut] for row in used], [label_of(row) for row in used])
    found: NDArray[np.float64] = model.decision_function(
        [row.conversation.response[:cut] for row in dev]
    )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, write `results/real_sources.jsonl`, print the rows."""
    parser = parser_of(__doc__)
    parser.add_argument("--statistic", default="shrunk-16")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    looks = count_look(str(arguments.data / "probe_dev.jsonl"))
    every, names, _ = read_scored(arguments.work, arguments.data)
    choice = next(one for one in TRIED if str(one) == arguments.statistic)
    train = fitted_rows(arguments.data)
    dev = np.flatnonzero(every.part == "dev")
    dev_rows = [every.rows[int(row)] for row in dev]
    rows: list[dict[str, Any]] = []
    for source in TWO_CLASS:
        here = every.source[dev] == source
        labels = every.harmful[dev][here]
        row: dict[str, Any] = {"source": source, "harmful": int(labels.sum()), "n": len(labels)}
        for name in (_READ, "residual, 4 layers"):
            for told, head in (("", name), (" without it", f"{name} without {source}")):
                paths = paths_of(every.head(names.index(head)), choice)
                own = [paths[int(place)] for place in dev[here]]
                row[f"{name}{told}"] = round(roc_auc_score(labels, peaks_at(own, 128)), 3)
        for told, left_out in (("", None), (" without it", source)):
            scores = words_of(train, dev_rows, 128, left_out)[here]
            row[f"words alone{told}"] = round(roc_auc_score(labels, scores), 3)
        rows.append(row)
        LOG.info("%s", json.dumps(row))
    means = {
        name: round(float(np.mean([row[name] for row in rows])), 3)
        for name in rows[0]
        if name not in ("source", "harmful", "n")
    }
    total = {"harmful": sum(r["harmful"] for r in rows), "n": sum(r["n"] for r in rows)}
    rows.append({"source": "mean", **total, **means})
    facts = card(
        model="Qwen2.5-Coder-0.5B-Instruct, first 20 of 24 blocks",
        statistic=arguments.statistic,
        tokens=128,
        looks_at_dev=looks,
    )
    write_results("real_sources", aligned(rows), facts)


if __name__ == "__main__":
    main()
