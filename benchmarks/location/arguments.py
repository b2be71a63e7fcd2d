"""The options that every study has, and the journal that it keeps.

Knows the command line and where results lie. Does not know what a study measures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.card import RESULTS, card
from benchmarks.location.pair import Pair
from probes.runs.journal import Journal
from safe_decode.demo.embedded_pair import artefact
from safe_decode.errors import DataError

__all__ = ["journal_of", "pair_of", "parser_of"]


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every study has."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="embedded", help="how the pair is called in results")
    parser.add_argument("--aligned", type=Path, help="default the embedded model")
    parser.add_argument("--unaligned", type=Path, help="default the embedded model")
    parser.add_argument("--prompts", type=Path, nargs="*", default=(), help="of another pair")
    parser.add_argument("--sources", nargs="*", default=(), help="of the rows of --prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "located")
    parser.add_argument("--tiny", action="store_true", help="a try of the code, not a study")
    return parser


def pair_of(arguments: argparse.Namespace) -> Pair:
    """Make the pair that was asked for.

    Raises:
        DataError: Another pair without its two models and its prompts.
    """
    if arguments.pair == "embedded":
        paths = [arguments.aligned or artefact("aligned")]
        paths.append(arguments.unaligned or artefact("unaligned"))
        return Pair("embedded", paths[0], paths[1], (), arguments.device)
    if not (arguments.aligned and arguments.unaligned and arguments.prompts):
        raise DataError(
            f"--pair={arguments.pair} needs --aligned, --unaligned and --prompts; pass all three."
        )
    return Pair(
        arguments.pair,
        arguments.aligned,
        arguments.unaligned,
        tuple(arguments.prompts),
        arguments.device,
        tuple(arguments.sources),
    )


def journal_of(
    study: str, pair: Pair, arguments: argparse.Namespace, **settings: object
) -> Journal:
    """Open `results/located/STUDY-PAIR.jsonl`; rows of other models or settings are replaced."""
    identity = {
        "study": study,
        "pair": pair.name,
        "models": pair.digest(),
        "seed": arguments.seed,
        **settings,
    }
    if pair.sources:
        identity["sources"] = list(pair.sources)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = f"{study}-{pair.name}.jsonl"
    return Journal(arguments.results / name, identity, facts=card(), other="replace")
