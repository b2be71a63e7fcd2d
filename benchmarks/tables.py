"""Published tables out of what the commands wrote: `python -m benchmarks.tables KIND ...`.

Knows which columns are published. Does not measure anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.card import card, write_results
from probes.attacks.records import adequacy, claim, read_records, rows_of

__all__ = ["attack_rows", "delay_rows", "evaluation_rows", "main", "served_rows"]


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
    arguments = parser.parse_args(argv)
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
