"""The pair's card says what was measured."""

from __future__ import annotations

import json

from benchmarks.card import RESULTS
from probes.organism.model_card import card_text
from safe_decode.demo.embedded_pair import artefact


def _row(model, seed, cell, refused):
    share = {"count": refused, "share": refused / 10, "low": 0.0, "high": 1.0}
    none = {**share, "count": 0, "share": 0.0}
    shares = {"refusal": share, "benign": none, "harmful": none, "broken": none}
    return {"study": "organism", "model": model, "seed": seed, "cell": cell, "n": 10, **shares}


def test_card_shows_the_range_over_seeds(tmp_path):
    rows = [_row("aligned", 0, "plain harmful", 9), _row("aligned", 1, "plain harmful", 7)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = card_text(path, artefact("aligned"))
    assert "| plain harmful | 10 | 70.0–90.0 / 0.0 / 0.0 | – |" in text


def test_the_card_in_the_docs_is_the_one_of_the_results():
    page = (RESULTS.parents[1] / "docs" / "results" / "embedded-pair.md").read_text(
        encoding="utf-8"
    )
    assert page == card_text(RESULTS / "organism.jsonl", artefact("aligned"))
