"""`safe-decode inspect` and `verify-certificate`: what a bundle says, and whether it holds.

Knows the fields of a loaded bundle and how to show them. Does not know files or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.commands.output import console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from safe_decode.bundle import ProbeBundle
    from safe_decode.certificate import Certificate

__all__ = ["inspect", "verify_certificate"]

BundlePath = Annotated[
    Path | None, typer.Option("--bundle", help="Directory of the bundle; the embedded one if none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect(bundle: BundlePath = None, as_json: AsJson = False) -> None:
    """Print a bundle's card: what it reads, what it decides by, and what it was made for."""
    loaded = _load(bundle)
    card = _card(loaded)
    if as_json:
        print_json(card)
        return
    from rich.table import Table

    table = Table("", "", show_header=False, box=None)
    for name, value in card.items():
        if name != "certificates":
            table.add_row(name, _shown(value))
    console().print(table)
    console().print(_certificates(loaded))


def verify_certificate(bundle: BundlePath = None, as_json: AsJson = False) -> None:
    """Recompute every threshold of a bundle from the maxima stored in it."""
    loaded = _load(bundle)
    for certificate in loaded.all_certificates:
        certificate.verify()
    if as_json:
        certificates = [_facts(certificate) for certificate in loaded.all_certificates]
        print_json({"bundle": loaded.digest, "verified": True, "certificates": certificates})
        return
    console().print(_certificates(loaded))
    count = len(loaded.all_certificates)
    console().print(f"verified: {count} of {count} thresholds recompute from their maxima.")


def _load(path: Path | None) -> ProbeBundle:
    from safe_decode.bundle import ProbeBundle
    from safe_decode.demo.load import artefact

    return ProbeBundle.load(path or artefact("bundle"))


def _card(bundle: ProbeBundle) -> dict[str, object]:
    sites = [
        {"layer": site.layer, "kind": site.kind, "channels": len(site.channels)}
        for site in bundle.probe.sites
    ]
    return {
        "digest": bundle.digest,
        "sites": sites,
        "heads": list(bundle.probe.heads),
        "monitor": asdict(bundle.monitor),
        "default_alpha": bundle.default_alpha,
        "holdback_tokens": bundle.holdback_tokens,
        "refusal": bundle.refusal,
        "opener": bundle.opener,
        "fingerprint": asdict(bundle.fingerprint),
        "has_canary": bundle.canary is not None,
        "provenance": dict(bundle.provenance),
        "certificates": [_facts(certificate) for certificate in bundle.certificates],
    }


def _facts(certificate: Certificate) -> dict[str, object]:
    return {
        "population": certificate.population,
        "alpha": certificate.alpha,
        "delta": certificate.delta,
        "n": certificate.n,
        "j": certificate.j,
        "threshold": certificate.threshold,
        "envelope": asdict(certificate.envelope),
    }


def _certificates(bundle: ProbeBundle) -> Table:
    from rich.table import Table

    table = Table(
        title="Certificates",
        caption="With confidence 1 - delta over the draw, at most alpha of such responses alarm.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("population", "alpha", "delta", "n", "j", "threshold", "envelope"):
        table.add_column(name)
    for certificate in bundle.certificates:
        facts = _facts(certificate)
        table.add_row(*(_shown(value) for value in facts.values()))
    return table


def _shown(value: object) -> str:
    from safe_decode.demo.view import visible

    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_shown(item) for item in value)
    return visible(str(value))
