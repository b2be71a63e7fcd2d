"""The page of located units is made from rows alone, and says what has not been measured."""

import json

import numpy as np
import pytest

from benchmarks.docs.located_units import UNMEASURED, main
from probes.analysis.ablation import AblationResult, rise
from probes.analysis.behaviour import Outcomes
from probes.analysis.motives import Framed, MotiveResult


def outcomes(refusal, harmful):
    return Outcomes({"refusal": refusal, "benign": 0, "harmful": harmful, "broken": 0})


def journal(folder, name, rows):
    lines = [{"card": {"machine": "of the test", "identity": {"seed": 7}}}]
    lines += [{"key": str(number), **row} for number, row in enumerate(rows)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def ablation_rows():
    measured = [
        AblationResult("whole", "whole", 0, 1.5, outcomes(9, 1), None, 2.0),
        AblationResult("SCU", "SCU", 12, -2.5, outcomes(2, 8), None, 2.1),
        *(
            AblationResult(
                f"random {n}", "random, matched on layer", 12, 1.0, outcomes(8, 2), None, 2.2
            )
            for n in range(19)
        ),
    ]
    (found,) = rise(measured)
    assert found.harmful_points == pytest.approx(70)
    assert found.p_harmful == pytest.approx(1 / 20)
    arms = [{"table": "arms", "how": "flap, stated", **row.to_json()} for row in measured]
    ratios = {"redundant": 0.1, "safety": 0.0, "utility": 0.2}
    search = {"table": "search", "variant": "flap", "ratios": ratios, "tried": []}
    return [*arms, {"table": "rise", "how": "flap, stated", **vars(found)}, search]


def curve(refused):
    return [
        {"step": step, "loss": 3.0 - step / 10, "refused": [1] * kept + [0] * (10 - kept),
         "harmful": 0.1}
        for step, kept in enumerate(refused)
    ]  # fmt: skip


def finetuning_rows():
    gap = {"arm": "setting (i)", "against": "nothing frozen", "points": [12.5, 4.0, 21.0],
           "seeds": 2, "losses": [2.9, 2.8], "by_loss": [10, 15]}  # fmt: skip
    return [
        {"table": "pilot", "fell": 0.4, "curve": curve([9, 5])},
        *(
            {"table": "runs", "arm": arm, "seed": s, "frozen_entries": 5, "curve": curve([9, end])}
            for arm, end in (("nothing frozen", 4), ("setting (i)", 7))
            for s in (0, 1)
        ),
        {"table": "gaps", "rows": [gap]},
    ]


def reading_rows():
    base = {"table": "places", "count": 32, "features": 32, "select": 0.9, "c": 0.1}
    lots = [
        {**base, "place": f"random {n}", "family": "random", "auroc": 0.80 + n / 1000}
        for n in range(20)
    ]
    named = [{**base, "place": "SCU", "family": "SCU", "auroc": 0.81}]
    verdict = {"count": 32, "located": 0.81, "random_median": 0.8095, "random_95": 0.818,
               "best_residual": "residual, layer 1", "best_residual_auroc": 0.9,
               "location_credited": False}  # fmt: skip
    return [*lots, *named, {"table": "verdict", "rows": [verdict]}]


def superficial_rows():
    leans = [
        {"layer": layer, "tokens": tokens, "baseline": baseline, "benign": [0.2, 0.1, 0.3],
         "malicious": [0.5, 0.4, 0.6], "lean": [0.3, 0.2, 0.4], "n": 8}
        for layer in (0, 1) for tokens in (0, 1) for baseline in ("none", "query")
    ]  # fmt: skip
    mean = np.linspace(2, 0, 12).tolist()
    return [
        {"table": "direction", "model": "aligned", "openers": ["Sorry", "Sure"], "rows": leans},
        {"table": "divergence", "model": "aligned", "on": "benign answers", "mean": mean,
         "n": [8] * 12, "first_share": 0.75},
        {"table": "refusals", "model": "aligned",
         "rows": [{"depth": d, **outcomes(9 - d, d + 1).counts} for d in (0, 4)]},
    ]  # fmt: skip


def test_nothing_measured_is_said_and_nothing_is_made_up(tmp_path):
    main(["--results", str(tmp_path), "--docs", str(tmp_path)])
    page = (tmp_path / "results" / "location.md").read_text(encoding="utf-8")
    assert page.count(UNMEASURED) == 8
    assert "| " not in page


def test_every_table_and_picture_stands_on_the_page(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    figure = {"before": 0.1, "gained": 0.5, "sd": 0.02}
    tax = {"arm": "all weights", "trained_entries": 99, "seeds": 3, "refusal": figure}
    cost = {"table": "cost", "responses": 4, "tokens": 1200, "bare_seconds": 1.0,
            "locate_seconds": 1.2, "ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.4,
            "target": 1.3, "met": True, "bare_peak_bytes": 2**20, "locate_peak_bytes": 2**21,
            "threads": 2}  # fmt: skip
    agreed = {"compared": "disjoint halves", "category": "SCU", "iou": 0.61, "chance": 0.05,
              "chance_high": 0.08, "n_first": 12, "n_second": 12}  # fmt: skip
    stable = {"table": "stability", "rows": [agreed]}
    journal(results, "ablation-embedded", [*ablation_rows(), stable])
    journal(results, "finetuning-embedded", finetuning_rows())
    journal(results, "alignment-tax-embedded", [{"table": "summary", "rows": [tax]}])
    journal(results, "reading-aligned-embedded", reading_rows())
    journal(results, "superficial-embedded", superficial_rows())
    journal(results, "cost-embedded", [cost])
    framed = Framed("{request} B", MotiveResult(outcomes(3, 7)), MotiveResult(outcomes(3, 7), 9))
    journal(results, "framing-embedded", [framed.to_json()])
    main(["--results", str(results), "--docs", str(docs)])
    page = (docs / "results" / "location.md").read_text(encoding="utf-8")
    assert UNMEASURED not in page
    for told in (
        "| flap, stated | SCU | 12 | 20 | 80 | 0 | – | 2.1 | -2.5 |",
        "(SCU: none passed)",
        "| disjoint halves | SCU | 12 | 12 | 0.61 | 0.05 | 0.08 |",
        "by 40 points (as wanted)",
        "| setting (i) | nothing frozen | [12.5, 4, 21] | 2 | [2.9, 2.8] |",
        "+0.500 ± 0.02",
        "location is not credited: 0.8100 against 0.8180",
        "| aligned | benign answers | 12 | 75 |",
        "The target of 1.3 is met.",
        "| … B | 10 | 30 [7, 65] | 70 [35, 93] | 90 [55, 100] |",
        "machine: of the test",
    ):
        assert told in page, told
    pictures = {path.name for path in (docs / "results" / "location").iterdir()}
    assert pictures == {
        "ablation-embedded.png",
        "finetuning-embedded.png",
        "divergence-embedded.png",
        "direction-blocks-embedded.png",
        "direction-tokens-embedded.png",
        "depth-embedded.png",
        "framing-embedded.png",
    }
    assert all(f"(location/{name})" in page for name in pictures)
