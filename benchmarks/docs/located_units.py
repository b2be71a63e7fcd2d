"""Writes docs/results/location.md from the studies' results.

Run: `python -m benchmarks.docs.located_units`.

Knows the order of the page, and which results stand where. Does not know how a figure was
measured; tables and pictures are in `located_tables` and
`located_curves`. A study that has not been run is named
as such.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.card import RESULTS
from benchmarks.docs import located_curves as curves
from benchmarks.docs import located_tables as tables
from benchmarks.docs.markdown import table
from probes.runs.journal import read_journal
from safe_decode.whole_files import write_whole

__all__ = ["Results", "location", "main", "page"]

ROOT = Path(__file__).resolve().parents[2]
UNMEASURED = "*Not measured yet.*"

_INTRODUCTION = """\
# Located units

Which units carry a model's refusals, what happens without them, what freezing them keeps, what
alignment costs, and where probes should read. The method is that of the superficial safety
alignment hypothesis (Li & Kim, arXiv 2410.10862), whose code is not public; where the paper is
silent, the choices are options, and [the decisions](../decisions/index.md) say which are the
defaults.

This page is written by `python -m benchmarks.docs.located_units` from
`benchmarks/results/located/`; no figure in it is typed. Negative results stay.
"""


class Results:
    """The journals of one pair.

    Args:
        folder: Where the studies wrote.
        pair: How the pair is called.
    """

    def __init__(self, folder: Path, pair: str) -> None:
        self.folder, self.pair = folder, pair

    def rows(self, study: str, table: str) -> list[tables.Row]:
        """Return the rows of one table; none where the study has not been run."""
        path = self.folder / f"{study}-{self.pair}.jsonl"
        if not path.exists():
            return []
        return [row for row in read_journal(path)[1] if row.get("table") == table]

    def facts(self, study: str) -> str:
        """Return what a study was measured on, as one line."""
        path = self.folder / f"{study}-{self.pair}.jsonl"
        if not path.exists():
            return ""
        card = read_journal(path)[0]
        told = {**card.get("identity", {}), **{k: v for k, v in card.items() if k != "identity"}}
        return f"*{'; '.join(f'{name}: {value}' for name, value in told.items())}.*"


def page(folder: Path, pictures: Path) -> str:
    """Write the page, and its pictures into a folder.

    Args:
        folder: Results.
        pictures: Where PNG files go; named relative to the page's own folder.
    """
    parts = [_INTRODUCTION]
    for pair in _pairs(folder):
        results = Results(folder, pair)
        parts.append(f"## The {pair} pair\n")
        parts += [_section(results, pictures, *section) for section in _SECTIONS]
    return "\n".join(parts)


def location(folder: Path = RESULTS / "located") -> str:
    """Say, a row a pair, model and number of features, what reading at located units buys."""
    cells: list[list[object]] = []
    for pair in _pairs(folder):
        for which in ("aligned", "unaligned"):
            results = Results(folder, pair)
            for verdict in results.rows(f"reading-{which}", "verdict"):
                cells += [_bought(pair, which, row) for row in verdict["rows"]]
    titles = ("pair", "read on", "features", "located", "random: median, 95th", "credited")
    return table((*titles, "best layer of the residual stream"), cells) if cells else ""


def _bought(pair: str, which: str, row: tables.Row) -> list[object]:
    return [
        pair,
        which,
        row["count"],
        row["located"],
        [row["random_median"], row["random_95"]],
        "yes" if row["location_credited"] else "no",
        f"{row['best_residual_auroc']:.4f} ({row['best_residual'].removeprefix('residual, ')})",
    ]


def _pairs(folder: Path) -> list[str]:
    studies = ("ablation", "reading-aligned")
    found = {
        file.stem.removeprefix(f"{study}-")
        for study in studies
        for file in folder.glob(f"{study}-*.jsonl")
    }
    return sorted(found | {"embedded"})


Writer = Callable[[Results, Path], str]


def _section(results: Results, pictures: Path, title: str, study: str, write: Writer) -> str:
    body = write(results, pictures) or UNMEASURED
    return "\n\n".join(part for part in (f"### {title}", body, results.facts(study)) if part) + "\n"


def _ablation(results: Results, pictures: Path) -> str:
    picture = pictures / f"ablation-{results.pair}.png"
    return tables.ablation(
        results.rows("ablation", "arms"),
        results.rows("ablation", "rise"),
        results.rows("ablation", "search"),
        picture,
    )


def _stability(results: Results, pictures: Path) -> str:
    del pictures
    return tables.stability(results.rows("ablation", "stability"))


def _finetuning(results: Results, pictures: Path) -> str:
    return curves.finetuning(
        results.rows("finetuning", "pilot"),
        results.rows("finetuning", "runs"),
        results.rows("finetuning", "gaps"),
        pictures / f"finetuning-{results.pair}.png",
    )


def _tax(results: Results, pictures: Path) -> str:
    del pictures
    return tables.alignment_tax(results.rows("alignment-tax", "summary"))


def _reading(results: Results, pictures: Path) -> str:
    del pictures
    found = []
    for which in ("aligned", "unaligned"):
        study = f"reading-{which}"
        told = tables.reading(results.rows(study, "places"), results.rows(study, "verdict"))
        if told:
            found.append(f"Read on the {which} model.\n\n{told}")
    return "\n\n".join(found)


def _superficial(results: Results, pictures: Path) -> str:
    return curves.superficial(
        results.rows("superficial", "direction"),
        results.rows("superficial", "divergence"),
        results.rows("superficial", "refusals"),
        pictures,
        results.pair,
    )


def _framing(results: Results, pictures: Path) -> str:
    path = results.folder / f"framing-{results.pair}.jsonl"
    rows = read_journal(path)[1] if path.exists() else []
    return tables.framing(rows, pictures / f"framing-{results.pair}.png") if rows else ""


def _cost(results: Results, pictures: Path) -> str:
    del pictures
    return tables.cost(results.rows("cost", "cost"))


_SECTIONS: tuple[tuple[str, str, Writer], ...] = (
    ("Without the units", "ablation", _ablation),
    ("Is the set stable?", "ablation", _stability),
    ("Frozen through benign fine-tuning", "finetuning", _finetuning),
    ("The alignment tax", "alignment-tax", _tax),
    ("Where should probes read?", "reading-aligned", _reading),
    ("How deep is the alignment?", "superficial", _superficial),
    ("The same request under many motives", "framing", _framing),
    ("What locating costs", "cost", _cost),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "located")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args(argv)
    pictures = arguments.docs / "results" / "location"
    pictures.mkdir(parents=True, exist_ok=True)
    target = arguments.docs / "results" / "location.md"
    write_whole(target, page(arguments.results, pictures).rstrip() + "\n")


if __name__ == "__main__":
    main()
