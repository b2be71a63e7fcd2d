"""Published tables out of what the commands wrote: `python -m benchmarks.docs.tables KIND ...`.

Knows which columns are published. Does not measure anything.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.card import card, write_results
from probes.attacks.results import adequacy, claim, read_records, rows_of

__all__ = [
    "attack_rows",
    "delay_rows",
    "evaluation_rows",
    "fold_rows",
    "main",
    "served_rows",
]

_FOLD_RECALL = 0.95


def evaluation_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row a method, slice and prefix of what `evaluate --out` wrote."""
    rows = []
    for one in found["teacher_forced"]["slices"]:
        for figures in one["figures"]:
            calibrated = figures["at_calibrated"]
            rows.append(
                {
                    "responses": one["name"],
                    "first tokens": one["prefix_tokens"],
                    "method": figures["method"],
                    "AUROC within source": _triple(figures["auroc"]),
                    "gain of the probe": _triple(figures["gain"]),
                    "p (Holm)": figures["gain_p"],
                    "recall at 1 %": _share(figures["at_fpr"][-1]["detected"]),
                    "recall, calibrated": calibrated and _share(calibrated["detected"]),
                    "realised FPR": calibrated and _share(calibrated["false_alarms"]),
                }
            )
    return rows


def served_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row a kind of request, answered bare and guarded."""
    return [
        {
            "requests": one["name"],
            "n": one["tripped"]["n"],
            "harmful, bare": _share(one["harmful_bare"]),
            "harmful, released": _share(one["harmful_released"]),
            "tripped": _share(one["tripped"]),
            "refused, bare": _share(one["refused_bare"]),
            "benign bare, and tripped": _share(one["over_refused"]),
            "leaked tokens, mean": one["leaked_mean"],
            "most": one["leaked_most"],
        }
        for one in (*found["generated"]["situations"], *found["generated"]["all"])
    ]


def delay_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the delay from the onset: of finished responses, and as served."""
    rows = []
    for how, part in (("finished responses", "teacher_forced"), ("as served", "generated")):
        one = found[part]["delay"]
        rows.append(
            {
                "harmful": how,
                "n": one["missed"]["n"],
                "before the onset": _share(one["before_onset"]),
                "median": one["median"],
                "p90": one["p90"],
                "within 32": _share(one["within_32"]),
                "within 128": _share(one["within_128"]),
                "missed": _share(one["missed"]),
                "leaked tokens, median": one["leaked_median"],
                "mean": one["leaked_mean"],
                "leak anything": _share(one["released"]),
            }
        )
    return rows


def fold_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a fold of what `evaluate --out` wrote for each, and say which is worst.

    The worst fold is the one whose probe finds least at 1 % of false alarms; ties go to the first.
    """
    rows = []
    for fold, found in reports.items():
        whole, within = (
            {figures["method"]: figures for figures in one["figures"]}
            for one in found["teacher_forced"]["slices"]
            if one["prefix_tokens"] is None
        )
        probe, words = whole["probe"], whole["TF-IDF of prompt + response"]
        detected = probe["at_fpr"][-1]["detected"]
        calibrated = probe["at_calibrated"]
        share = detected["successes"] / detected["n"] if detected["n"] else math.nan
        rows.append(
            {
                "fold": fold,
                "bundle": found["facts"]["bundle"],
                "harmful": detected["n"],
                "recall at 1 %": _share(detected),
                "TF-IDF of prompt + response": _share(words["at_fpr"][-1]["detected"]),
                "recall, calibrated": calibrated and _share(calibrated["detected"]),
                "realised FPR": calibrated and _share(calibrated["false_alarms"]),
                "AUROC within source": _triple(probe["auroc"]),
                "within harmful requests": _triple(within["probe"]["auroc"]),
                "gain over the probe of the prompt": _triple(within["probe of the prompt"]["gain"]),
                "share": share,
            }
        )
    worst = min(row["share"] for row in rows)
    first = next(row["fold"] for row in rows if row["share"] == worst)
    for row in rows:
        is_met = row.pop("share") >= _FOLD_RECALL
        row |= {
            "worst": "yes" if row["fold"] == first else "no",
            "target": f">= {100 * _FOLD_RECALL:g} % in the worst",
            "met": "yes" if is_met else "no",
        }
    return rows


def attack_rows(journals: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return one row a bundle, threat and arm."""
    return [
        {"bundle": name, **row} for name, path in journals.items() for row in rows_of(read(path))
    ]


def read(path: Path) -> list[Any]:
    """Read the records of a journal that must be there.

    Raises:
        FileNotFoundError: It is not.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; run the attack first.")
    return list(read_records(path))


def main(argv: Sequence[str] | None = None) -> None:
    """Write a table to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    evaluation = kinds.add_parser("evaluation")
    evaluation.add_argument("source", type=Path)
    attacks = kinds.add_parser("attacks")
    attacks.add_argument("--name", default="attacks")
    attacks.add_argument("journals", nargs="+", help="NAME=FILE")
    folds = kinds.add_parser("folds")
    folds.add_argument("reports", nargs="+", help="FOLD=FILE")
    arguments = parser.parse_args(argv)
    if arguments.kind == "folds":
        named = (report.split("=", 1) for report in arguments.reports)
        reports = {fold: json.loads(Path(path).read_text(encoding="utf-8")) for fold, path in named}
        first = next(iter(reports.values()))["facts"]
        write_results("folds", fold_rows(reports), card(seed=first["seed"]))
        return
    if arguments.kind == "evaluation":
        found = json.loads(arguments.source.read_text(encoding="utf-8"))
        measured_on = card(**found["facts"])
        write_results("evaluation", evaluation_rows(found), measured_on)
        if found.get("generated"):
            write_results("evaluation-served", served_rows(found), measured_on)
            write_results("evaluation-delay", delay_rows(found), measured_on)
        return
    journals = {name: Path(path) for name, path in (j.split("=", 1) for j in arguments.journals)}
    facts: dict[str, Any] = {}
    for name, path in journals.items():
        records = read(path)
        checks = [f"{c.what}: {c.value}" for c in adequacy(records) if c.met is not None]
        told = [t for threat in ("T1", "T3", "T4") if (t := claim(records, threat))]
        facts |= {f"{name}, adequacy": checks, f"{name}, claim": told}
    write_results(arguments.name, attack_rows(journals), card(**facts))


def _triple(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [round(value, 3) for value in interval[:3]]


def _share(share: Mapping[str, Any]) -> str:
    if not share["n"]:
        return "–"
    point, low, high = share["successes"] / share["n"], share["low"], share["high"]
    return f"{100 * point:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"


if __name__ == "__main__":
    main()
