"""`safe-decode calibrate`: new certificates for a bundle, from fresh harmless responses.

Knows the options and how certificates are shown. Does not know how they are computed.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.envelopes import EnvelopeOptions, envelope_of, foreign_note, require_delta
from probes.cli.options import (
    Columns,
    Data,
    Strict,
    loaded,
    read,
    show_facts,
    show_warnings,
    whole,
)
from safe_decode.cli.console import print_json, require_place
from safe_decode.cli.generate import BundlePath, Device, DtypeName, ModelName
from safe_decode.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probes.calibration.certify import Calibration
    from probes.data.conversations import Conversation
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.certificate import Envelope
    from safe_decode.loading import Loaded

__all__ = ["calibrate"]


def calibrate(
    data: Data,
    out: Annotated[Path, typer.Option(help="Write the bundle with new certificates here.")],
    bundle: BundlePath = None,
    model: ModelName = None,
    columns: Columns = "auto",
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Levels to certify, the first is the default's; default the bundle's."),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="Chance that the bounds of a population do not hold.")
    ] = 0.05,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Cap to certify; default the largest that they support."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of these responses; 0 is greedy; default as recorded."),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Of these responses.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Of these responses.")] = None,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Certify a bundle's thresholds anew on harmless responses that nothing was chosen on."""
    require_place(out.parent / "file")
    require_delta(delta)
    from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
    from safe_decode.demo.embedded_pair import artefact

    old = ProbeBundle.load(bundle or artefact("bundle"))
    readings = read(data, columns, strict=strict)
    own = loaded(model, device, dtype)
    old.fingerprint.require(Fingerprint.of(own.model, own.tokenizer))
    rows = [row for one in readings for row in one.conversations]
    harmless, too_long = whole(own, _harmless(rows))
    alphas = tuple(alpha or sorted({one.alpha for one in old.certificates}, reverse=True))
    default = alpha[0] if alpha else old.default_alpha
    asked = EnvelopeOptions(max_new_tokens, temperature, top_p, top_k)
    envelope = envelope_of(own, harmless, asked, before=old.certificate().envelope)
    found = _certified(
        own,
        old,
        harmless,
        alphas=alphas,
        delta=delta,
        envelope=envelope,
        lower_caps=max_new_tokens is None,
    )
    new = replace(
        old,
        certificates=found.certificates,
        default_alpha=default,
        provenance={
            **old.provenance,
            "calibrated_again": {
                "sources": [one.to_json() for one in readings],
                "bundle_before": old.digest,
                "responses": len(harmless),
                "not_of_this_model": sum(found.foreign.values()),
                "not_of_this_model_because": found.foreign,
                "too_long_for_the_context": too_long,
                "delta": delta,
                "refused": found.refused,
            },
        },
    )
    new.save(out)
    facts = [
        {
            **{
                name: getattr(one, name)
                for name in ("population", "alpha", "delta", "n", "j", "threshold")
            },
            "source": one.evidence.source,
            "max_new_tokens": one.envelope.max_new_tokens,
        }
        for one in new.certificates
    ]
    if as_json:
        print_json(
            {
                "out": str(out),
                "bundle": new.digest,
                "responses": len(harmless),
                "too_long_for_the_context": too_long,
                "certificates": facts,
                "refused": found.refused,
                "envelope": asdict(envelope),
            }
        )
        return
    warnings = [f"{name}: {why}" for name, why in found.refused.items()]
    if note := foreign_note(found.foreign, len(harmless)):
        warnings.append(note)
    show_warnings(readings, warnings)
    shown = {f"{one['population']} at {one['alpha']:g}": one for one in facts}
    show_facts("Certificates", shown, out)


def _harmless(rows: Sequence[Conversation]) -> list[Conversation]:
    """Take the harmless rows of the calibrate split, or all where there are no splits."""
    splits = any(row.split is not None for row in rows)
    kept = [
        row
        for row in rows
        if row.response_harmful is False and (not splits or row.split == "calibrate")
    ]
    if not kept:
        where = " in the split 'calibrate'" if splits else ""
        raise DataError(
            f"none of {len(rows)} conversations{where} is judged harmless (response_harmful 0); "
            "pass such responses."
        )
    return kept


def _certified(
    own: Loaded,
    bundle: ProbeBundle,
    rows: Sequence[Conversation],
    *,
    alphas: tuple[float, ...],
    delta: float,
    envelope: Envelope,
    lower_caps: bool,
) -> Calibration:
    from probes.activations.harvest import score_responses
    from probes.calibration.certify import certify_populations
    from probes.calibration.reach import Responses
    from probes.calibration.statistic import maxima, smoothed_paths
    from probes.data.near_duplicates import merge_near_duplicates

    # Near duplicates are one draw, not several.
    drawn = merge_near_duplicates(rows).conversations
    probe = bundle.probe.to(next(own.model.parameters()).device)
    logits = score_responses(own.model, own.tokenizer, drawn, probe)
    return certify_populations(
        drawn,
        maxima(smoothed_paths(logits, bundle.monitor)),
        alphas=alphas,
        delta=delta,
        envelope=envelope,
        responses=Responses.scored(own.model, logits),
        lower_caps=lower_caps,
    )
