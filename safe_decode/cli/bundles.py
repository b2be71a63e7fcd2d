"""`safe-decode inspect` and `verify-certificate`: what a bundle says, and whether it holds.

Knows the fields of a loaded bundle and how to show them. Does not know files or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json
from safe_decode.cli.loading import loaded_bundle
from safe_decode.cli.options import JsonOptions, NamedBundle
from safe_decode.cli.tables import WordTable, print_table

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.bundle.summary import BundleSummary
    from safe_decode.certificate import Certificate

__all__ = ["inspect", "verify_certificate"]

_LONGEST_ENTRY = 200
"""Characters of an entry of the provenance that is shown; `--json` shows all of it."""


@dataclass(frozen=True, kw_only=True)
class InspectedBundle(NamedBundle, JsonOptions):
    """Options of `safe-decode inspect` and `safe-decode verify-certificate`."""

    key: Annotated[
        Path | None,
        typer.Option(
            help="Public key that must have signed the bundle, a PEM file. Without it: the "
            "signature is not checked."
        ),
    ] = None

    def load(self) -> ProbeBundle:
        """Load the bundle, its signature checked where a key is given."""
        return loaded_bundle(self.place, trusted_key=self.key)

    def signature(self) -> str:
        """Say whether the loaded bundle is signed; with a key, that was checked."""
        from safe_decode.bundle.signing import is_signed
        from safe_decode.demo.embedded_pair import artefact
        from safe_decode.fetching.bundle_places import bundle_folder

        if self.key is not None:
            return f"holds for the key {self.key}"
        is_there = is_signed(bundle_folder(self.place or artefact("bundle")))
        return "there, not checked: pass --key" if is_there else "none"


@command("Tools")
def inspect(options: InspectedBundle) -> None:
    """Say which model a bundle guards, what it catches, what to beware of, and all it holds."""
    from safe_decode.bundle.summary import summary_of

    loaded = options.load()
    summary = summary_of(loaded)
    card = {**_card(loaded), "signature": options.signature()}
    if options.as_json:
        print_json({"summary": _summary_facts(summary), **card})
        return
    print_table(WordTable(("", ""), summary.rows(), f"Bundle {loaded.digest[:16]}"))
    console().print()
    _print_certificates(loaded.all_certificates)
    console().print()
    told = {name: value for name, value in card.items() if name != "certificates"}
    told["provenance"] = _briefly(loaded.provenance)
    details = [(name.replace("_", " "), _shown(value)) for name, value in told.items()]
    print_table(WordTable(("", ""), details, "Details"))


@command("Tools")
def verify_certificate(options: InspectedBundle) -> None:
    """Recompute every threshold and cap of a bundle from the maxima and lengths stored in it."""
    from safe_decode.bundle.plausible import require_plausible

    loaded = options.load()
    every = loaded.all_certificates
    for certificate in every:
        certificate.verify()
    require_plausible(loaded)
    recorded = sum(certificate.evidence.is_recorded for certificate in every)
    if options.as_json:
        print_json(
            {
                "bundle": loaded.digest,
                "verified": True,
                "caps_verified": recorded,
                "signature": options.signature(),
                "certificates": [_facts(certificate) for certificate in every],
            }
        )
        return
    _print_certificates(every)
    console().print(
        f"verified: {len(every)} of {len(every)} thresholds recompute from their maxima."
    )
    console().print(_caps_told(len(every), recorded))
    console().print(f"signature: {options.signature()}", soft_wrap=True)


def _caps_told(count: int, recorded: int) -> str:
    text = f"caps: {recorded} of {count} recompute from the lengths of their responses"
    missing = count - recorded
    if not missing:
        return f"{text}."
    return (
        f"{text}; of {missing} neither lengths nor writers are recorded, so their caps are taken."
    )


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
        "dtypes": list(bundle.dtypes),
        "fingerprint": asdict(bundle.fingerprint),
        "has_canary": bundle.canary is not None,
        "provenance": dict(bundle.provenance),
        "certificates": [_facts(certificate) for certificate in bundle.all_certificates],
    }


def _facts(certificate: Certificate) -> dict[str, object]:
    return {
        "population": certificate.population,
        "dtype": certificate.dtype,
        "alpha": certificate.alpha,
        "delta": certificate.delta,
        "n": certificate.n,
        "j": certificate.j,
        "threshold": certificate.threshold,
        "source": certificate.evidence.source,
        "lengths": certificate.evidence.lengths_in_words,
        "supported_cap": certificate.supported_cap,
        "envelope": asdict(certificate.envelope),
    }


def _summary_facts(summary: BundleSummary) -> dict[str, object]:
    worth = summary.worth
    return {
        "model": summary.model,
        "dtype": summary.dtype,
        "worth": None if worth is None else asdict(worth),
        "finds": [asdict(one) for one in summary.finds],
        "is_located": summary.is_located,
        "reads": summary.reads,
        "made": summary.made,
        "made_by": summary.made_by,
        "warnings": list(summary.warnings),
    }


def _print_certificates(certificates: Sequence[Certificate]) -> None:
    """Print thresholds, then how the responses were made that they speak of."""
    facts = [_facts(certificate) for certificate in certificates]
    numbers = ("alpha", "delta", "n", "j", "threshold")
    shown = ("population", "dtype", *numbers, "source")
    told = WordTable(
        shown,
        [[_shown(one[name]) for name in shown] for one in facts],
        "Certificates",
        "With confidence 1 - delta over the draw, at most alpha of such responses alarm. "
        "Source: on-policy, the model's own responses; off-policy, texts of others too; "
        "unrecorded, the bundle does not say.",
        right=numbers,
    )
    print_table(told)
    console().print()
    made: dict[tuple[str, str], list[str]] = {}
    for one in facts:
        made.setdefault((_shown(one["lengths"]), _shown(one["envelope"])), []).append(
            _shown(one["population"])
        )
    of = [
        "all of them" if len(made) == 1 else ", ".join(dict.fromkeys(who)) for who in made.values()
    ]
    rows = [(who, lengths, envelope) for who, (lengths, envelope) in zip(of, made, strict=True)]
    print_table(WordTable(("of", "lengths", "envelope"), rows, "Certified responses"))


def _briefly(provenance: Mapping[str, object]) -> dict[str, object]:
    """Cut long entries; those that the summary tells are left out."""
    found: dict[str, object] = {}
    for name, value in provenance.items():
        text = _shown(value)
        if name not in ("worth", "made", "made_by"):
            found[name] = value if len(text) <= _LONGEST_ENTRY else "long, see --json"
    return found


def _shown(value: object) -> str:
    from safe_decode.trace.shown import visible

    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key}={_shown(item)}" for key, item in value.items() if item not in ({}, (), [])
        )
    if isinstance(value, list | tuple):
        return "; ".join(_shown(item) for item in value)
    return visible(str(value))
